"""Call equal blocks instead of writing each out, so that a compiler compiles one of them.

A denoiser is some thirty equal blocks; traced, it is one flat graph, and the time to compile that grows with its depth.
Nothing of the model's modules is looked for: a region is a run of calls that the graph repeats with the same operators,
constants, shapes, strides and wiring. One copy becomes a submodule; weights and whatever else differs from copy to copy
are its inputs.

    a = linear(x, w0); x1 = x + gelu(a)         x1 = invoke_subgraph(region_0, x, w0)
    b = linear(x1, w1); x2 = x1 + gelu(b)  ->   x2 = invoke_subgraph(region_0, x1, w1)
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
        call_region(graph_module, copies)
        changed += len(copies)
    graph.lint()
    graph_module.recompile()
    return PassReport("fold_repeated_regions", True, changed, before, len(calls(graph)))


def _sequence(graph: fx.Graph) -> list[fx.Node]:
    """The calls, without views of inputs that nothing repeats: such a view may be of a part that only one block
    reads."""
    given: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or (is_view(node) and given.issuperset(node.all_input_nodes)):
            given.add(node)
    sequence = calls(graph)
    tokens = _tokens(sequence)
    often = Counter(tokens)
    return [node for node, token in zip(sequence, tokens, strict=True) if node not in given or often[token] > 1]


def _best(sequence: list[fx.Node], least: float) -> list[Run]:
    """The copies of the region that spares most, as far as `_GOOD_ENOUGH` lets it; none if nothing spares `least`."""
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
        if may_be_in_a_region(node) and (len(node.all_input_nodes) == 1 or not may_share(node)):
            key = (written(node, lambda n: metadata(value_of(n))), metadata(value_of(node)))
        tokens.append(numbers.setdefault(key, len(numbers)))
    return tokens


def _equal_copies(sequence: list[fx.Node], repeat: Repeat) -> list[Run]:
    """The largest set of occurrences with the same wiring, which equal tokens do not tell, and with tensors only in and
    out."""
    classes: dict[Any, list[Run]] = {}
    for start in repeat.starts:
        copy = run_of(sequence[start : start + repeat.length])
        if copy.has_tensors_only():
            classes.setdefault(copy.wiring, []).append(copy)
    return max(classes.values(), key=len, default=[])


def _passed_on(sequence: list[fx.Node], repeat: Repeat) -> int:
    """Bytes that an occurrence, the one in the middle, gives to what comes after it."""
    start = repeat.starts[len(repeat.starts) // 2]
    inside = set(sequence[start : start + repeat.length])
    return sum(bytes_of(n) for n in inside if any(u not in inside for u in n.users))
