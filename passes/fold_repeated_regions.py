"""Call equal blocks instead of writing each out, so that a compiler compiles one of them.

    a = linear(x, w0); x1 = x + gelu(a)         x1 = invoke_subgraph(region_0, x, w0)
    b = linear(x1, w1); x2 = x1 + gelu(b)  ->   x2 = invoke_subgraph(region_0, x1, w1)

A denoiser consists of some thirty equal blocks. Traced, it is one flat graph, and the time to compile it grows with its
depth. The pass does not look at the model's modules: a region is a run of calls that the graph repeats with the same
operators, constants, shapes, strides and wiring. One copy becomes a submodule. Weights, and everything else that
differs from copy to copy, are its inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx

from ._compat import invoke_subgraph
from ._cost import count_launches, launches
from ._graph import bytes_of, calls, is_view, value_of
from ._pass import PassReport
from ._region import Run, call_region, count_regions, may_be_in_a_region, may_share, metadata, run_of, written
from ._repeats import Repeat, find_repeats

_LEAST_LAUNCHES = 8
"""Smaller regions are left alone: their boundaries, across which nothing is fused, would cost more than they save."""

_LEAST_SHARE = 0.04
"""Share of all kernels that a region must save, so that calls which different blocks happen to share stay apart."""

_GOOD_ENOUGH = 0.5
"""Of the repeats that save at least this share of the best one's saving, take the one that passes on fewest bytes."""


def fold_repeated_regions(
    graph_module: fx.GraphModule,
    *,
    may_fold: Callable[[fx.Node], bool] = lambda node: True,
    largest: bool = False,
) -> PassReport:
    """Replace repeated runs of calls by calls of shared submodules ``region_0``, ``region_1``, …, in place.

    Exact: the same operators run on the same tensors. Compiled, nothing is fused across a region's boundary, so a
    result may be rounded otherwise than that of the unfolded graph. Impure calls are in no region.

    Args:
        graph_module: An ATen graph with ``meta["val"]``.
        may_fold: Which calls may be in a region. A run never crosses one that may not.
        largest: Take the region that saves most. By default it may be one that saves half as much and passes on fewer
            bytes, because what it passes on is kept for the calls behind it. In a training step, whose backward reads
            what a block has computed, these bytes are kept anyway, and a smaller region is fused less.

    Returns:
        The report; `changed` counts calls of regions.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import count_regions, fold_repeated_regions
        >>> def block(x):
        ...     return x.sin().cos().exp().tanh().sin().cos().exp().tanh() + 1
        >>> graph_module = make_fx(lambda x: block(block(block(x))), tracing_mode="fake")(torch.ones(2))
        >>> fold_repeated_regions(graph_module).changed
        3
        >>> count_regions(graph_module)
        {'region_0': 3}
    """
    graph = graph_module.graph
    before = len(calls(graph))
    changed = 0
    least = _LEAST_SHARE * _count_all_launches(graph_module, may_fold)
    while copies := _best(_Calls(graph, may_fold), least, largest):
        call_region(graph_module, copies)
        changed += len(copies)
    graph.lint()
    graph_module.recompile()
    return PassReport("fold_repeated_regions", True, changed, before, len(calls(graph)))


class _Calls:
    """The calls of a graph in order, without views of inputs that nothing repeats, and a number for each.

    Such a view may be of a part that only one block reads. Numbers are equal for equal operators, constants, and
    metadata of inputs and results; a call that must not be folded has a number of its own.
    """

    def __init__(self, graph: fx.Graph, may_fold: Callable[[fx.Node], bool]) -> None:
        given: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr") or (is_view(node) and given.issuperset(node.all_input_nodes)):
                given.add(node)
        numbered = list(zip(calls(graph), _tokens(calls(graph), may_fold), strict=True))
        often = Counter(number for _, number in numbered)
        kept = [(node, number) for node, number in numbered if node not in given or often[number] > 1]
        self.nodes, self.tokens = [node for node, _ in kept], [number for _, number in kept]


def _is_region(node: fx.Node) -> bool:
    return node.target is invoke_subgraph


def _best(sequence: _Calls, least: float, largest: bool) -> list[Run]:
    """The copies of the region that saves most, within `_GOOD_ENOUGH`; none if nothing saves `least`."""
    nodes = sequence.nodes
    kernels = [0]
    for node in nodes:
        kernels.append(kernels[-1] + (0 if may_share(node) else launches(node)))  # views end up outside again

    def size(repeat: Repeat) -> int:
        return kernels[repeat.starts[0] + repeat.length] - kernels[repeat.starts[0]]

    def spared(repeat: Repeat) -> int:
        return (len(repeat.starts) - 1) * size(repeat)

    found = [r for r in find_repeats(sequence.tokens) if size(r) >= _LEAST_LAUNCHES]
    most = max(map(spared, found), default=0)
    good = [r for r in found if spared(r) >= max(least, _GOOD_ENOUGH * most)]

    def order(repeat: Repeat) -> tuple[int, int]:
        cost = _passed_on(nodes, repeat), -spared(repeat)
        return cost[::-1] if largest else cost

    for repeat in sorted(good, key=order):
        copies = _equal_copies(nodes, repeat)
        if (len(copies) - 1) * size(repeat) >= least:
            return copies
    return []


def _count_all_launches(graph_module: fx.GraphModule, may_fold: Callable[[fx.Node], bool]) -> int:
    """Count launches of what may be folded, and of each call of a region as its contents."""
    total = sum(launches(node) for node in calls(graph_module.graph) if may_fold(node) or _is_region(node))
    for name, n_calls in count_regions(graph_module).items():
        region = graph_module.get_submodule(name)
        assert isinstance(region, fx.GraphModule)
        total += n_calls * (count_launches(region) - 1)
    return total


def _tokens(sequence: list[fx.Node], may_fold: Callable[[fx.Node], bool]) -> list[int]:
    numbers: dict[Any, int] = {}
    tokens = []
    for node in sequence:
        key: Any = node
        if may_fold(node) and may_be_in_a_region(node) and (len(node.all_input_nodes) == 1 or not may_share(node)):
            key = (written(node, lambda n: metadata(value_of(n))), metadata(value_of(node)))
        tokens.append(numbers.setdefault(key, len(numbers)))
    return tokens


def _equal_copies(sequence: list[fx.Node], repeat: Repeat) -> list[Run]:
    """The largest set of occurrences with equal wiring, which equal tokens do not imply.

    Only tensors go in and out of them.
    """
    classes: dict[Any, list[Run]] = {}
    for start in repeat.starts:
        copy = run_of(sequence[start : start + repeat.length])
        if copy.has_tensors_only():
            classes.setdefault(copy.wiring, []).append(copy)
    return max(classes.values(), key=len, default=[])


def _passed_on(sequence: list[fx.Node], repeat: Repeat) -> int:
    """Bytes that the middle occurrence passes on to later calls."""
    start = repeat.starts[len(repeat.starts) // 2]
    inside = set(sequence[start : start + repeat.length])
    return sum(bytes_of(n) for n in inside if any(u not in inside for u in n.users))
