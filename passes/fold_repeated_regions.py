"""Call equal blocks instead of writing each out, so that a compiler compiles one of them.

A denoiser is some thirty equal blocks; traced, it is one flat graph, and the time to compile that grows with its depth.
Nothing of the model's modules is looked for: a region is a run of calls that the graph repeats with the same operators,
constants, shapes, strides and wiring. One copy becomes a submodule; weights and whatever else differs from copy to copy
are its inputs.

    a = linear(x, w0); x1 = x + gelu(a)         x1 = invoke_subgraph(region_0, x, w0)
    b = linear(x1, w1); x2 = x1 + gelu(b)  ->   x2 = invoke_subgraph(region_0, x1, w1)

All calls stay in one graph: one ``torch.compile``, one CUDA graph. ``torch.compiler.nested_compile_region`` gives the
same operator, but not here: its frontend refuses inputs that share memory, as the views of one packed row do. Run this
pass on what Dynamo captured, before the backend compiles it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._cost import count_launches, launches
from ._graph import MAY_COPY, bytes_of, calls, impurity, is_assertion, is_static, is_view, op_name, tensor_of, value_of
from ._pass import PassReport
from ._repeats import Repeat, find_repeats

invoke_subgraph = torch.ops.higher_order.invoke_subgraph

_LEAST_LAUNCHES = 8
"""Smaller regions are left: their boundaries, across which nothing is fused, would cost more than they spare."""

_LEAST_SHARE = 0.04
"""Of all kernels, what a region must spare: a few calls that two different blocks have in common are left apart."""

_GOOD_ENOUGH = 0.5
"""Among repeats that spare so much of what the best spares, the one is chosen whose copies pass on the fewest bytes."""


def fold_repeated_regions(graph_module: fx.GraphModule) -> PassReport:
    """Replace repeated runs of calls by calls of shared submodules ``region_0``, ``region_1``, …, in place.

    Exact: the same operators run on the same tensors. Compiled, nothing is fused across a region's boundary, so the
    result may round otherwise than that of the unfolded graph. Impure calls are in no region. `changed` counts calls of
    regions.
    """
    graph = graph_module.graph
    before = len(calls(graph))
    changed = 0
    least = _LEAST_SHARE * _count_all_launches(graph_module)
    while copies := _best(_sequence(graph), least):
        name = _free_name(graph_module)
        given = sorted({at for copy in copies for node in _passed(copy) for at in _sources(copy, node)})
        graph_module.add_submodule(name, _extract(graph_module, copies[0], given))
        now: dict[fx.Node, fx.Node] = {}
        for copy in copies:
            now |= _replace(graph, name, copy, given, now)
        changed += len(copies)
    graph.lint()
    graph_module.recompile()
    return PassReport("fold_repeated_regions", True, changed, before, len(calls(graph)))


def count_regions(graph_module: fx.GraphModule) -> dict[str, int]:
    """Region's name -> how often `graph_module` calls it."""
    counts: dict[str, int] = {}
    for node in graph_module.graph.find_nodes(op="call_function", target=invoke_subgraph):
        counts[node.args[1]] = counts.get(node.args[1], 0) + 1
    return counts


@dataclass(frozen=True)
class _Copy:
    """One occurrence: `nodes` in graph order, and what they read from outside, in order of first use."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


def _sequence(graph: fx.Graph) -> list[fx.Node]:
    """The calls, without views of inputs that nothing repeats: in a row, each block reads slices of its own."""
    given: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or (is_view(node) and given.issuperset(node.all_input_nodes)):
            given.add(node)
    sequence = calls(graph)
    tokens = _tokens(sequence)
    often = Counter(tokens)
    return [node for node, token in zip(sequence, tokens, strict=True) if node not in given or often[token] > 1]


def _best(sequence: list[fx.Node], least: float) -> list[_Copy]:
    """The copies of the region that spares most, as far as `_GOOD_ENOUGH` lets it; none if nothing spares `least`."""
    kernels = [0]
    for node in sequence:
        kernels.append(kernels[-1] + (0 if _may_share(node) else launches(node)))  # views end up outside again

    def size(repeat: Repeat) -> int:
        return kernels[repeat.starts[0] + repeat.length] - kernels[repeat.starts[0]]

    def spared(repeat: Repeat) -> int:
        return (len(repeat.starts) - 1) * size(repeat)

    found = [r for r in find_repeats(_tokens(sequence)) if size(r) >= _LEAST_LAUNCHES]
    most = max(map(spared, found), default=0)
    good = [r for r in found if spared(r) >= max(least, _GOOD_ENOUGH * most)]
    for repeat in sorted(good, key=lambda r: (_passed_on(sequence, r), -spared(r))):
        copies = _equal_copies(sequence, repeat)
        if (len(copies) - 1) * size(repeat) >= least:
            return copies
    return []


def _count_all_launches(graph_module: fx.GraphModule) -> int:
    """As `count_launches`, each call of a region counted as what is in it."""
    total = count_launches(graph_module)
    for name, n_calls in count_regions(graph_module).items():
        region = graph_module.get_submodule(name)
        assert isinstance(region, fx.GraphModule)
        total += n_calls * (count_launches(region) - 1)
    return total


def _tokens(sequence: list[fx.Node]) -> list[int]:
    """A number for each call, equal for equal operators, constants, and metadata of inputs and results. What must not
    be folded has a number of its own."""
    numbers: dict[Any, int] = {}
    tokens = []
    for node in sequence:
        key: Any = node
        if _is_foldable(node):
            key = (_written(node, lambda n: _metadata(value_of(n))), _metadata(value_of(node)))
        tokens.append(numbers.setdefault(key, len(numbers)))
    return tokens


def _is_foldable(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is invoke_subgraph or impurity(node) or is_assertion(node):
        return False
    if any(value is not None and not is_static(value) for value in map(tensor_of, (node, *node.all_input_nodes))):
        return False
    return len(node.all_input_nodes) == 1 or not _may_share(node)


def _equal_copies(sequence: list[fx.Node], repeat: Repeat) -> list[_Copy]:
    """The largest set of occurrences with the same wiring, which equal tokens do not tell, and with tensors only in and
    out."""
    classes: dict[Any, list[_Copy]] = {}
    for start in repeat.starts:
        nodes = tuple(sequence[start : start + repeat.length])
        names: dict[fx.Node, Any] = {node: at for at, node in enumerate(nodes)}
        inputs: list[fx.Node] = []
        wiring = []
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in names:
                    names[source] = ("input", len(inputs))
                    inputs.append(source)
            wiring.append(_written(node, names.__getitem__))
        copy = _Copy(nodes, tuple(inputs))
        given = [nodes[at] for node in _passed(copy) for at in _sources(copy, node)]
        if all(tensor_of(n) is not None for n in (*inputs, *given)):
            classes.setdefault(tuple(wiring), []).append(copy)
    return max(classes.values(), key=len, default=[])


def _passed_on(sequence: list[fx.Node], repeat: Repeat) -> int:
    """Bytes that an occurrence, the one in the middle, gives to what comes after it."""
    start = repeat.starts[len(repeat.starts) // 2]
    inside = set(sequence[start : start + repeat.length])
    return sum(bytes_of(n) for n in inside if any(u not in inside for u in n.users))


def _extract(graph_module: fx.GraphModule, copy: _Copy, given: list[int]) -> fx.GraphModule:
    """`copy` as a graph of its own that gives those of its nodes."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for at, source in enumerate(copy.inputs):
        values[source] = graph.placeholder(f"input_{at}")
        values[source].meta.update(source.meta)
    for node in copy.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[copy.nodes[at]] for at in given))
    graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph)


def _replace(
    graph: fx.Graph, name: str, copy: _Copy, given: list[int], now: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Call the region in the place of `copy`; what now stands for its nodes. `now`: the same, of earlier copies."""
    passed = _passed(copy)
    inside = set(copy.nodes)
    inputs = tuple(now.get(source, source) for source in copy.inputs)
    with graph.inserting_after(copy.nodes[-1]):
        region = graph.get_attr(name)
    with graph.inserting_after(region):
        last = call = graph.call_function(invoke_subgraph, (region, name, *inputs))
    key = "val" if "val" in copy.nodes[-1].meta else "example_value"
    call.meta[key] = tuple(value_of(copy.nodes[at]) for at in given)
    stands_for: dict[fx.Node, fx.Node] = {}
    for item, at in enumerate(given):
        with graph.inserting_after(last):
            last = stands_for[copy.nodes[at]] = graph.call_function(operator.getitem, (call, item))
        last.meta.update(copy.nodes[at].meta)
    for node in passed:
        for view in _views(node, inside):
            if view not in stands_for:
                with graph.inserting_after(last):
                    last = stands_for[view] = graph.node_copy(view, lambda n: stands_for.get(n, now.get(n, n)))
    for node in passed:
        node.replace_all_uses_with(stands_for[node], delete_user_cb=lambda user: user not in inside)
    for node in reversed(copy.nodes):
        graph.erase_node(node)
    return stands_for


def _passed(copy: _Copy) -> list[fx.Node]:
    """The nodes that something after `copy` reads."""
    inside = set(copy.nodes)
    return [node for node in copy.nodes if any(user not in inside for user in node.users)]


def _sources(copy: _Copy, node: fx.Node) -> list[int]:
    """The place in `copy` of the tensor whose memory `node` may share; none if that came in from outside."""
    inside = {n: at for at, n in enumerate(copy.nodes)}
    while _may_share(node) and node in inside:
        node = node.all_input_nodes[0]
    return [inside[node]] if node in inside else []


def _views(node: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """The views among `inside` that lead to `node`, the one nearest to their root first."""
    chain: list[fx.Node] = []
    while _may_share(node) and node in inside:
        chain.insert(0, node)
        node = node.all_input_nodes[0]
    return chain


def _may_share(node: fx.Node) -> bool:
    """Whether what `node` gives may lie in the memory of its first argument; a region must give memory of its own."""
    return is_view(node) or (node.op == "call_function" and op_name(node.target) in MAY_COPY)


def _written(node: fx.Node, name: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """Operator and arguments, with nodes replaced by their `name`, as something that compares and hashes."""

    def freeze(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", name(value))
        if isinstance(value, (tuple, list)):
            return tuple(map(freeze, value))
        if isinstance(value, dict):
            return tuple((k, freeze(v)) for k, v in sorted(value.items()))
        if isinstance(value, slice):
            return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
        return (type(value), value.hex() if isinstance(value, float) else value)

    return (node.target, freeze(node.args), freeze(node.kwargs))


def _metadata(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.device, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, (tuple, list)):
        return tuple(map(_metadata, value))
    return type(value)


def _free_name(graph_module: fx.GraphModule) -> str:
    at = 0
    while hasattr(graph_module, f"region_{at}"):
        at += 1
    return f"region_{at}"
