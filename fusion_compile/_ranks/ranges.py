"""Which entries of a flat bank are whose, where each rank keeps its own alone.

A piece of the bank, some `unit` entries for each rank, is cut into as many neighbouring ranges, the first rank's first.
A range may begin and end inside of a parameter, so this is for updates that take each entry by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._ranks.groups import Group
from fusion_compile._ranks.shares import LEAST_BYTES, MOST, Piece, Share
from fusion_compile._state.banks import Bank
from fusion_compile.optim._transform import Place

_ALIGNMENT = 16
"""Bytes at whose multiples ranges begin."""


@dataclass(frozen=True)
class Ranges(Share):
    """What this rank has of one flat bank. A piece's `each` is the number of entries that a rank gets at most."""

    @property
    def kept(self) -> int:
        """How many entries this rank has."""
        return sum(stop - start for start, stop in self._mine())

    @property
    def owned(self) -> Bank:
        """The bank as this rank's optimizer sees it: of each parameter the entries in its ranges, as a vector."""
        places: list[Place] = []
        at = 0
        for start, stop in self._mine():
            for place, first, last in self._within(start, stop):
                places.append(Place(place.name, (last - first,), at + place.at + first - start))
            if at == 0 and start < stop and (not places or places[0].at):  # it begins with what fills a parameter up
                places.insert(0, Place(self.bank.places[0].name, (0,), 0))
            at += stop - start
        return Bank(self.bank.key, self.bank.dtype, None, tuple(places), at)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of something shaped like the whole bank; a copy."""
        return torch.cat([whole[start:stop] for start, stop in self._mine()])

    def leaving(self, parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What travels of the gradients `parts`, one a place: one tensor a piece, which waits for its parameters."""
        flat = {
            p.name: (part.permute(p.order) if p.order else part).reshape(-1).to(dtype)
            for p, part in zip(self.bank.places, parts, strict=True)
        }
        found = []
        for piece in self.pieces:
            cut, at = [], piece.start
            for place, first, last in self._within(piece.start, piece.stop):
                cut += [*_zeros(flat[place.name], place.at + first - at), flat[place.name][first:last]]
                at = place.at + last
            filled = piece.start + piece.each * self._size
            cut += _zeros(next(iter(flat.values())), filled - at)
            found.append(torch.cat(cut))
        return found

    def arrived(self, sums: Sequence[Tensor]) -> Tensor:
        """This rank's part of the gradient from what was reduced of its pieces."""
        return torch.cat([s[: stop - start] for s, (start, stop) in zip(sums, self._mine(), strict=True)])

    def sent(self, owned: Tensor) -> list[Tensor]:
        """What this rank sends of its part, shaped like `owned` in the leading dimension: one tensor a piece."""
        out, at = [], 0
        for piece, (start, stop) in zip(self.pieces, self._mine(), strict=True):
            part = owned[at : at + stop - start]
            if short := piece.each - (stop - start):
                part = torch.cat([part, owned[-1:].expand(short, *owned.shape[1:])])
            out.append(part.contiguous())
            at += stop - start
        return out

    def whole(self, gathered: Sequence[Tensor]) -> Tensor:
        """The whole bank from what all ranks sent of their parts."""
        return torch.cat([both[: p.stop - p.start] for p, both in zip(self.pieces, gathered, strict=True)])

    def views(self, gathered: Sequence[Tensor]) -> dict[str, Tensor]:
        """The whole parameters of the bank, by full name: views of the pieces in which they lie."""
        parts: dict[str, list[Tensor]] = {place.name: [] for place in self.bank.places}
        for piece, both in zip(self.pieces, gathered, strict=True):
            for place, first, last in self._within(piece.start, piece.stop):
                parts[place.name].append(both[place.at + first - piece.start : place.at + last - piece.start])
        empty = gathered[0][:0]
        flat = {name: torch.cat(cut) if len(cut) > 1 else (cut or [empty])[0] for name, cut in parts.items()}
        return {place.name: self.bank.shaped(flat[place.name], place) for place in self.bank.places}

    def first_names(self) -> list[str]:
        """For each piece, the first parameter in it."""
        inside = [[place.name for place, *_ in self._within(p.start, p.stop)] for p in self.pieces]
        return [(names or [self.bank.places[-1].name])[0] for names in inside]

    @property
    def _size(self) -> int:
        assert self.inner is not None
        return self.inner.size

    def _mine(self) -> list[tuple[int, int]]:
        assert self.inner is not None
        rank = self.inner.rank
        starts = [(p, min(p.stop, p.start + rank * p.each)) for p in self.pieces]
        return [(start, min(p.stop, start + p.each)) for p, start in starts]

    def _within(self, start: int, stop: int) -> Iterator[tuple[Place, int, int]]:
        """The places of which entries lie in ``[start, stop)`` of the bank, with which of their own."""
        for place in self.bank.places:
            first, last = max(start - place.at, 0), min(stop - place.at, place.numel)
            if first < last:
                yield place, first, last


def ranges(bank: Bank, inner: Group, outer: Group | None, itemsize: int) -> Ranges | None:
    """The flat `bank` divided among the ranks of `inner`; None where one would have nothing. `itemsize`: of entries as
    they travel."""
    step = max(1, _ALIGNMENT // bank.dtype.itemsize)
    pieces = min(MOST, max(1, math.ceil(bank.length * itemsize / LEAST_BYTES)))
    unit = math.ceil(bank.length / (inner.size * pieces * step)) * step
    starts = range(0, bank.length, unit * inner.size)
    cut = tuple(Piece(start, min(start + unit * inner.size, bank.length), unit) for start in starts)
    if cut[0].stop <= (inner.size - 1) * unit:
        return None
    return Ranges(bank, inner, outer, cut)


def _zeros(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_zeros(count)] if count else []
