"""The peak memory of a fused graph, estimated by Inductor's rules for which values get memory."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from fusion_compile.explain._graph.costs import is_alias, mutated
from fusion_compile.explain._graph.lifetimes import Held, Lifetimes
from fusion_compile.passes._graph import op_name

_MOST_READS = 4
"""A value with several readers gets memory if it reads more values (Inductor's ``realize_reads_threshold``)."""

_ELEMENTWISE = {"clone", "_to_copy", "where", "gelu_backward", "silu_backward", "threshold_backward", "copy_", "arange"}
_ELEMENTWISE |= {"zeros", "ones", "full", "scalar_tensor", "zeros_like", "ones_like", "full_like", "new_zeros"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "prod", "all", "any", "var", "var_mean", "_softmax"}
_REDUCTIONS |= {"_log_softmax", "linalg_vector_norm", "native_layer_norm", "native_layer_norm_backward", "mse_loss"}


def fused_peak(graph: fx.Graph, nodes: Sequence[fx.Node], lives: Lifetimes) -> int:
    """Estimate the peak bytes of `nodes`, those of `graph` except its output, with elementwise work fused.

    An elementwise result that only elementwise operators and reductions read is computed where it is read. It takes no
    memory, but its own inputs must live until then. Deviations from Inductor: the order of the nodes is kept, which
    Inductor may improve, and every reduction's result has memory, which Inductor may save.
    """
    inlined: dict[fx.Node, frozenset[Held]] = {}
    for node in nodes:
        if _is_elementwise(node) and not mutated(node):
            reads = frozenset(r for s in node.all_input_nodes for m in lives.held[s] for r in inlined.get(m[0], {m}))
            readers = list(_readers(node))
            if all(map(_fuses, readers)) and (len(readers) == 1 or len(reads) <= _MOST_READS):
                inlined[node] = reads
    ends: dict[Held, int] = {}
    for i, node in enumerate(nodes):
        if node not in inlined:
            for source in (node, *node.all_input_nodes):
                for memory in lives.held[source]:
                    ends.update(dict.fromkeys(inlined.get(memory[0], {memory}), i))
    outputs = {m for n in graph.output_node().all_input_nodes for m in lives.held[n]}
    given_back = defaultdict(list)
    for memory, end in ends.items():
        if memory not in outputs and memory not in lives.inputs:
            given_back[end].append(memory)
    alive = peak = sum(lives.sizes[m] for m in lives.inputs)
    for i, node in enumerate(nodes):
        if node not in inlined:
            alive += sum(lives.sizes[m] for m in lives.made.get(node, ()) if m not in lives.inputs)
        peak = max(peak, alive)
        alive -= sum(lives.sizes[m] for m in given_back[i])
    return peak


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Return the nodes that read the result of `node`, also through views."""
    for user in node.users:
        if user.op == "call_function" and (is_alias(user) or user.target is operator.getitem):
            yield from _readers(user)
        else:
            yield user


def _fuses(reader: fx.Node) -> bool:
    return _is_elementwise(reader) or (reader.op == "call_function" and op_name(reader.target) in _REDUCTIONS)


def _is_elementwise(node: fx.Node) -> bool:
    if node.op != "call_function" or is_alias(node):
        return False
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node.target) in _ELEMENTWISE
