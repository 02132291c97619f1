"""The order in which Inductor may run kernels: the one that keeps the least memory alive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from torch import fx

from fusion_compile.explain._graph.costs import mutated
from fusion_compile.explain._graph.lifetimes import Held, Lifetimes

_LONGEST = 2000
"""Longer programs keep their order: each step looks at everything that could run next."""


def least_memory_order(
    units: Sequence[fx.Node], reads: Mapping[fx.Node, Iterable[Held]], lives: Lifetimes, kept: Set[Held]
) -> list[fx.Node]:
    """Order `units` so that at each step the one runs that raises the peak least, and then the one that frees most.

    Inductor's ``reorder_for_peak_memory`` tries such an order too. `reads`: what each unit reads or writes. `kept`:
    memory that is never freed. A unit runs after those whose results it reads; writes in place keep their order.
    """
    if len(units) > _LONGEST:
        return list(units)
    needs = _needs(units, reads, lives)
    waiting = {unit: len(needs[unit]) for unit in units}
    behind = defaultdict(list)
    for unit in units:
        for needed in needs[unit]:
            behind[needed].append(unit)
    left: dict[Held, int] = defaultdict(int)
    for unit in units:
        for memory in set(reads[unit]):
            left[memory] += 1
    place = {unit: i for i, unit in enumerate(units)}
    ready = {unit for unit in units if not waiting[unit]}
    order: list[fx.Node] = []
    alive = peak = 0

    def sizes(unit: fx.Node) -> tuple[int, int]:
        made = sum(lives.sizes[m] for m in lives.made.get(unit, ()) if m not in lives.inputs)
        freed = sum(lives.sizes[m] for m in set(reads[unit]) if m not in kept and left[m] == 1)
        return made, freed

    while ready:
        costs = {unit: sizes(unit) for unit in ready}
        chosen = min(ready, key=lambda u: (max(peak, alive + costs[u][0]), costs[u][0] - costs[u][1], place[u]))
        made, freed = costs[chosen]
        peak, alive = max(peak, alive + made), alive + made - freed
        ready.discard(chosen)
        order.append(chosen)
        for memory in set(reads[chosen]):
            left[memory] -= 1
        for unit in behind[chosen]:
            waiting[unit] -= 1
            if not waiting[unit]:
                ready.add(unit)
    return order


def _needs(
    units: Sequence[fx.Node], reads: Mapping[fx.Node, Iterable[Held]], lives: Lifetimes
) -> dict[fx.Node, set[fx.Node]]:
    """Return for each unit those that must run before it: the makers of what it reads, and around writes in place."""
    maker = {memory: unit for unit in units for memory in lives.made.get(unit, ())}
    needs: dict[fx.Node, set[fx.Node]] = {unit: set() for unit in units}
    writer: dict[Held, fx.Node] = {}
    readers: dict[Held, list[fx.Node]] = defaultdict(list)
    for unit in units:
        for memory in reads[unit]:
            needs[unit] |= {each for each in (maker.get(memory), writer.get(memory)) if each is not None}
        for memory in (m for written in mutated(unit) for m in lives.held[written]):
            needs[unit].update(readers[memory])
            writer[memory] = unit
            readers[memory] = []
        for memory in reads[unit]:
            readers[memory].append(unit)
        needs[unit].discard(unit)
    return needs
