"""The peak memory of a fused graph, estimated by Inductor's rules for which values get memory."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from fusion_compile.explain import _compat
from fusion_compile.explain._graph.costs import is_alias, mutated
from fusion_compile.explain._graph.lifetimes import Held, Lifetimes
from fusion_compile.explain._graph.schedule import least_memory_order
from fusion_compile.passes import lower_to_aten
from fusion_compile.passes._graph import op_name, value_of

_MOST_READS = 4
"""A value with several readers gets memory if it reads more values (Inductor's ``realize_reads_threshold``)."""
_MOST_NODES = 3000
"""Larger graphs are not decomposed as Inductor decomposes them: that takes as long as the trace itself."""

_ELEMENTWISE = {"clone", "_to_copy", "where", "gelu_backward", "silu_backward", "threshold_backward", "copy_", "arange"}
_ELEMENTWISE |= {"zeros", "ones", "full", "scalar_tensor", "zeros_like", "ones_like", "full_like", "new_zeros"}
_ELEMENTWISE |= {"select_scatter", "slice_scatter", "constant_pad_nd"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "prod", "all", "any", "var", "var_mean", "_softmax"}
_REDUCTIONS |= {"_log_softmax", "linalg_vector_norm", "native_layer_norm", "native_layer_norm_backward", "mse_loss"}
_RESHAPES = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach", "getitem"}
"""Views whose elements lie in the order of what they look at."""
_HEAVY = {"exp", "sigmoid"}
"""On a CPU Inductor computes these once, and does not repeat them in each kernel that reads them."""


def fused_peak(module: fx.GraphModule) -> int:
    """Estimate the peak bytes of `module`, a graph in ATen operators, if Inductor compiles it.

    An elementwise result that only elementwise operators and reductions read is computed where it is read. It takes no
    memory, but its own inputs must live until then. A kernel writes into the memory of an input that nothing else
    reads any more, if both have the same size and order. Kernels run in the given order, or in that which keeps least
    memory alive. Deviations from Inductor: every reduction's result has memory, which Inductor may save; scratch memory
    inside library kernels is not seen; and very large graphs keep their operators and their order.
    """
    graph = _as_inductor_decomposes(module).graph
    nodes = [n for n in graph.nodes if n.op != "output"]
    lives = Lifetimes(nodes)
    inlined, in_order = _inlined(nodes, lives)
    units = [n for n in nodes if n not in inlined]
    reads = {n: _memory(n, (n, *n.all_input_nodes), inlined, lives) for n in units}
    kept = lives.inputs | {m for n in graph.output_node().all_input_nodes for m in lives.held[n]}
    orders = (units, least_memory_order(units, reads, lives, kept))
    return min(_peak(order, reads, in_order, lives, kept) for order in orders)


def _as_inductor_decomposes(module: fx.GraphModule) -> fx.GraphModule:
    """Return `module` in the operators that Inductor fuses, with its patterns of attention replaced; `module` itself
    where this torch does not tell them."""
    if len(module.graph.nodes) > _MOST_NODES:
        return module
    try:
        lowered = lower_to_aten(module, gradients=False, decompositions=_compat.inductor_decompositions())
        lowered.graph.eliminate_dead_code()
        names = {op_name(n.target) for n in lowered.graph.nodes if n.op == "call_function"}
        if {"amax", "exp", "bmm"} <= names:
            _compat.replace_attention(lowered)
    except Exception:  # of any kind: it is torch's private part, and an estimate must not end an explanation
        return module
    return lowered


def _inlined(
    nodes: Sequence[fx.Node], lives: Lifetimes
) -> tuple[dict[fx.Node, frozenset[Held]], dict[fx.Node, frozenset[Held]]]:
    """Return the nodes without memory, each with the memory that it reads; and for each node the memory that it reads
    element by element in order."""
    inlined: dict[fx.Node, frozenset[Held]] = {}
    in_order: dict[fx.Node, frozenset[Held]] = {}
    seen: dict[fx.Node, frozenset[Held]] = {}  # in order, as a reader of this node sees it
    heavy: set[fx.Node] = set()
    levels = _levels(nodes)
    for node in nodes:
        own = frozenset(lives.held[node])
        if is_alias(node) or node.target is operator.getitem:
            source = node.all_input_nodes[0]
            seen[node] = seen[source] if op_name(node.target) in _RESHAPES else frozenset()
            heavy |= {node} if source in heavy else set()
            continue
        seen[node] = own
        if not _is_elementwise(node) or mutated(node):
            continue
        in_order[node] = frozenset(m for s in node.all_input_nodes for m in seen[s])
        reads = _memory(node, node.all_input_nodes, inlined, lives)
        readers = list(_readers(node))
        if op_name(node.target) in _HEAVY or any(s in heavy and s in inlined for s in node.all_input_nodes):
            heavy.add(node)
        repeated = node in heavy and len(readers) > 1 and _on_cpu(node) and _is_repeated(node, levels)
        if all(map(_fuses, readers)) and (len(readers) == 1 or len(reads) <= _MOST_READS) and not repeated:
            inlined[node] = reads
            seen[node] = in_order[node]
    return inlined, in_order


def _memory(
    node: fx.Node, sources: Sequence[fx.Node], inlined: Mapping[fx.Node, frozenset[Held]], lives: Lifetimes
) -> frozenset[Held]:
    """Return the memory behind `sources`, that of inlined nodes replaced by what they read."""
    return frozenset(r for s in sources for m in lives.held[s] for r in inlined.get(m[0], {m}))


def _peak(
    order: Sequence[fx.Node],
    reads: Mapping[fx.Node, frozenset[Held]],
    in_order: Mapping[fx.Node, frozenset[Held]],
    lives: Lifetimes,
    kept: set[Held],
) -> int:
    ends = {memory: i for i, node in enumerate(order) for memory in reads[node]}
    given_back = defaultdict(list)
    for memory, end in ends.items():
        if memory not in kept:
            given_back[end].append(memory)
    alive = peak = sum(lives.sizes[m] for m in lives.inputs)
    for i, node in enumerate(order):
        free = given_back[i]
        for made in lives.made.get(node, ()):
            if made in lives.inputs:
                continue
            size, read = lives.sizes[made], in_order.get(node, frozenset())
            over = [m for m in free if m in read and m != made and lives.sizes[m] == size]
            if over:
                free.remove(over[0])  # the kernel writes into this memory
            else:
                alive += size
        peak = max(peak, alive)
        alive -= sum(lives.sizes[m] for m in free)
    return peak


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Return the nodes that read the result of `node`, also through views."""
    for user in node.users:
        if user.op == "call_function" and (is_alias(user) or user.target is operator.getitem):
            yield from _readers(user)
        else:
            yield user


def _is_repeated(node: fx.Node, levels: Mapping[fx.Node, int]) -> bool:
    """Whether several kernels would compute `node`: with sums over different axes, or with a library call between."""
    axes, at = set(), set()
    waiting, seen = [node], {node}
    while waiting:
        for reader in _readers(waiting.pop()):
            if reader in seen or not _fuses(reader):
                continue
            seen.add(reader)
            elementwise = _is_elementwise(reader)
            if elementwise and all(map(_fuses, _readers(reader))):
                waiting.append(reader)
                continue
            at.add(levels[reader])
            if not elementwise:
                axes.add(str(reader.args[1]) if len(reader.args) > 1 else "")
    return len(axes) > 1 or len(at) > 1


def _levels(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return for each node the most library calls on a way to it."""
    levels: dict[fx.Node, int] = {}
    for node in nodes:
        view = is_alias(node) or node.target is operator.getitem
        library = node.op == "call_function" and not view and not _fuses(node)
        levels[node] = max((levels[s] for s in node.all_input_nodes), default=0) + library
    return levels


def _on_cpu(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _fuses(reader: fx.Node) -> bool:
    return _is_elementwise(reader) or (reader.op == "call_function" and op_name(reader.target) in _REDUCTIONS)


def _is_elementwise(node: fx.Node) -> bool:
    if node.op != "call_function" or is_alias(node):
        return False
    name = op_name(node.target)
    if (
        name == "scatter"
    ):  # of one number into a constant: a comparison with the index, as in a cross entropy's gradient
        into = node.all_input_nodes[0]
        return into.op == "call_function" and op_name(into.target) == "full" and len(node.all_input_nodes) == 2
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in _ELEMENTWISE
