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
from typing import Any

from torch import fx

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


def fold_repeated_regions(graph_module: fx.GraphModule) -> PassReport:
    """Replace repeated runs of calls by calls of shared submodules ``region_0``, ``region_1``, …, in place.

    Exact: the same operators run on the same tensors. Compiled, nothing is fused across a region's boundary, so a
    result may be rounded otherwise than that of the unfolded graph. Impure calls are in no region.

    Args:
        graph_module: An ATen graph with ``meta["val"]``.

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
    least = _LEAST_SHARE * _count_all_launches(graph_module)
    while copies := _best(_sequence(graph), least):
        call_region(graph_module, copies)
        changed += len(copies)
    graph.lint()
    graph_module.recompile()
    return PassReport("fold_repeated_regions", True, changed, before, len(calls(graph)))


def _sequence(graph: fx.Graph) -> list[fx.Node]:
    """The calls, without views of inputs that nothing repeats.

    Such a view may be of a part that only one block reads.
    """
    given: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or (is_view(node) and given.issuperset(node.all_input_nodes)):
            given.add(node)
    sequence = calls(graph)
    tokens = _tokens(sequence)
    often = Counter(tokens)
    return [node for node, token in zip(sequence, tokens, strict=True) if node not in given or often[token] > 1]


def _best(sequence: list[fx.Node], least: float) -> list[Run]:
    """The copies of the region that saves most, within `_GOOD_ENOUGH`; none if nothing saves `least`."""
    kernels = [0]
    for node in sequence:
        kernels.append(kernels[-1] + (0 if may_share(node) else launches(node)))  # views end up outside again

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
    """Count launches as `count_launches`, with each call of a region counted as its contents."""
    total = count_launches(graph_module)
    for name, n_calls in count_regions(graph_module).items():
        region = graph_module.get_submodule(name)
        assert isinstance(region, fx.GraphModule)
        total += n_calls * (count_launches(region) - 1)
    return total


def _tokens(sequence: list[fx.Node]) -> list[int]:
    """A number for each call, equal for equal operators, constants, and metadata of inputs and results.

    A call that must not be folded has a number of its own.
    """
    numbers: dict[Any, int] = {}
    tokens = []
    for node in sequence:
        key: Any = node
        if may_be_in_a_region(node) and (len(node.all_input_nodes) == 1 or not may_share(node)):
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
