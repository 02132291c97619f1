"""Parts on all ranks <-> whole tensors on their owners: one all_to_all for each dtype, whatever the number of tensors.

A part is sent as it is, without padding: ranks may hold parts of different size, or none, and own different numbers of
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_compile._ranks.shards.spread import Box

_AS_THEY_ARE = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32}
_AS_THEY_ARE |= {torch.int64}
"""dtypes that every backend sends; others are sent as bytes."""


@dataclass(frozen=True)
class Item:
    """One tensor. `boxes`: by rank, what it holds of it. `owner`: the rank that has it whole and gives it back.
    `also`: ranks that get the whole, too, and never give it back."""

    name: str
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    owner: int | None
    also: tuple[int, ...] = ()

    @property
    def receivers(self) -> tuple[int, ...]:
        """Ranks that get the whole."""
        return self.also if self.owner is None else (self.owner, *self.also)


@dataclass(frozen=True)
class Exchange:
    """`items` between the ranks of `group`, in the same order on all of them. `me`: this rank's place in it."""

    items: tuple[Item, ...]
    group: Any
    me: int
    ranks: int

    def to_owners(self, parts: Callable[[Item], Tensor], into: Mapping[str, Tensor], device: torch.device) -> None:
        """Send this rank's part of each item, and write what arrives into the whole tensors `into` that it owns."""
        for dtype, items in _by_dtype(self.items):
            sent = [[(i, i.boxes[self.me]) for i in items if rank in i.receivers] for rank in range(self.ranks)]
            due = [[(i, i.boxes[rank]) for i in items if self.me in i.receivers] for rank in range(self.ranks)]
            places = [[box.of(into[i.name]) for i, box in row] for row in due]
            known: dict[str, Tensor] = {}

            def part(item: Item, box: Box, known: dict[str, Tensor] = known) -> Tensor:
                return known[item.name] if item.name in known else known.setdefault(item.name, parts(item))

            self._swap(sent, part, places, dtype, device)

    def to_parts(self, whole: Mapping[str, Tensor], into: Callable[[Item], Tensor], device: torch.device) -> None:
        """Send every rank its part of the `whole` tensors that this one owns; write what arrives where `into` says."""
        for dtype, items in _by_dtype(self.items):
            sent = [[(i, i.boxes[rank]) for i in items if i.owner == self.me] for rank in range(self.ranks)]
            places = [[into(i) for i in items if i.owner == rank] for rank in range(self.ranks)]
            self._swap(sent, lambda item, box: box.of(whole[item.name]), places, dtype, device)

    def all_say(self, what: Any) -> list[Any]:
        """What every rank says, in their order."""
        heard: list[Any] = [None] * self.ranks
        dist.all_gather_object(heard, what, group=self.group)
        return heard

    def _swap(
        self,
        sent: Sequence[Sequence[tuple[Item, Box]]],
        part: Callable[[Item, Box], Tensor],
        places: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        given = [part(item, box).detach().reshape(-1) for row in sent for item, box in row]
        out = torch.cat(given) if given else torch.empty(0, dtype=dtype, device=device)
        counts = [sum(box.numel for _, box in row) for row in sent]
        wanted = [sum(place.numel() for place in row) for row in places]
        arrived = torch.empty(sum(wanted), dtype=dtype, device=device)
        wire, size = (dtype, 1) if dtype in _AS_THEY_ARE else (torch.uint8, dtype.itemsize)
        dist.all_to_all_single(
            arrived.view(wire), out.view(wire), [n * size for n in wanted], [n * size for n in counts], group=self.group
        )
        flat = [place for row in places for place in row]
        for place, piece in zip(flat, torch.split(arrived, [place.numel() for place in flat]), strict=True):
            place.copy_(piece.view(place.shape))


def _by_dtype(items: Iterable[Item]) -> list[tuple[torch.dtype, list[Item]]]:
    """The items of each dtype that have entries at all: all ranks find the same."""
    sorted_in: dict[torch.dtype, list[Item]] = {}
    for item in items:
        if any(math.prod(box.shape) for box in item.boxes) and item.receivers:
            sorted_in.setdefault(item.dtype, []).append(item)
    return list(sorted_in.items())
