"""What each rank holds of a group's DTensor parameters while they are updated: its part, the whole, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusion_compile._ranks.shards.exchange import Exchange, Item
from fusion_compile._ranks.shards.groups import group_of, refuse_other_devices
from fusion_compile._ranks.shards.owners import owners
from fusion_compile._ranks.shards.spread import Spread, local_part, spread_of


@dataclass(frozen=True)
class Wanted:
    """How an update wants one parameter. `by_parts`: whether every rank may update its own part. `cost`: of the whole,
    to share out the work."""

    by_parts: Callable[[Spread], bool]
    cost: float


@dataclass(frozen=True)
class Holding:
    """One parameter. `owner`: the place in ``spread.ranks`` of the rank that updates it whole; None where every rank
    updates its part. `also`: places of ranks that update a copy of the whole, because they would have nothing to do:
    a program has at least one parameter. Nobody reads what comes of it."""

    spread: Spread
    owner: int | None
    also: tuple[int, ...] = ()

    @property
    def has_whole(self) -> bool:
        """Whether this rank has the whole."""
        return self.spread.me == self.owner or self.is_copy

    @property
    def is_copy(self) -> bool:
        """Whether this rank has a whole that nobody reads."""
        return self.spread.me in self.also

    @property
    def has_part(self) -> bool:
        """Whether this rank updates its own part."""
        return self.owner is None and not self.is_copy and self.spread.mine.numel > 0


def holdings(parameters: Mapping[str, Any], wanted: Mapping[str, Wanted]) -> dict[str, Holding]:
    """Share out the DTensor `parameters`. ValueError for one whose parts are no boxes."""
    spreads = {name: spread_of(name, p) for name, p in parameters.items()}
    found: dict[str, Holding] = {}
    for ranks in dict.fromkeys(s.ranks for s in spreads.values()):
        here = {name: s for name, s in spreads.items() if s.ranks == ranks}
        whole = {n: wanted[n].cost for n, s in here.items() if s.cut and not wanted[n].by_parts(s)}
        owned = owners(whole, len(ranks), [0.0] * len(ranks))
        busy = set(owned.values())
        busy |= {i for n, s in here.items() if n not in owned for i, box in enumerate(s.boxes) if box.numel}
        idle = tuple(i for i in range(len(ranks)) if i not in busy)
        smallest = min(here, key=lambda n: wanted[n].cost)
        found |= {n: Holding(s, owned.get(n), idle if n == smallest else ()) for n, s in here.items()}
    return {name: found[name] for name in parameters}


def exchanges(parameters: Mapping[str, Any], held: Mapping[str, Holding]) -> list[Exchange]:
    """What the ranks send each other: one exchange for each set of ranks that share parameters.

    ValueError where a process group cannot send what lies on the parameters' device.
    """
    found = []
    for ranks in _sets(held.values()):
        names = [n for n, h in held.items() if h.spread.ranks == ranks]
        items = [
            Item(n, parameters[n].dtype, held[n].spread.boxes, held[n].owner, held[n].also)
            for n in names
            if held[n].owner is not None or held[n].also
        ]
        first = held[names[0]].spread
        group = group_of(ranks, first.mesh)
        refuse_other_devices(group, device_of(parameters[names[0]]), f"{names[0]} {list(first.shape)}")
        found.append(Exchange(tuple(items), group, first.me, len(ranks)))
    return found


def _sets(held: Iterable[Holding]) -> list[tuple[int, ...]]:
    return [ranks for ranks in dict.fromkeys(h.spread.ranks for h in held) if len(ranks) > 1]


def device_of(p: Any) -> torch.device:
    """Where this rank's part of a DTensor lies."""
    return local_part(p).device
