"""Which matrices of a bank are whose, and in which pieces its gradient travels.

Matrix k of a bank that is divided among g ranks belongs to rank ``k mod g``: each has ⌊K/g⌋ or ⌈K/g⌉ of them, whole,
and a stretch of neighbouring layers holds as many of each. A gradient travels in at most `MOST` pieces a bank, each of
such a stretch, so that the first can leave while the backward still computes the others. What travels is filled up with
zeros to the same size for each rank; what is kept is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._ranks.groups import Group
from fusion_compile._state.banks import Bank
from fusion_compile.optim._transform import Place

MOST = 8
"""Pieces of one bank."""
LEAST_BYTES = 25 * 2**20
"""A piece is at least as large as that, below which latency decides; except where a bank is smaller."""


class Piece(NamedTuple):
    """The matrices ``[start, stop)`` of a bank; `each`: how many of them a rank gets at most."""

    start: int
    stop: int
    each: int


@dataclass(frozen=True)
class Share:
    """What this rank has of one bank.

    Attributes:
        bank: The whole one.
        inner: The ranks among which it is divided; None where each rank has all of it.
        outer: The ranks that have the same part; None for this one alone. Without `inner`: all ranks.
        pieces: In which its gradient and its new weights travel.
    """

    bank: Bank
    inner: Group | None
    outer: Group | None
    pieces: tuple[Piece, ...]

    @property
    def copies(self) -> int:
        """How many ranks have this part."""
        return 1 if self.outer is None else self.outer.size

    @property
    def mine(self) -> range:
        """Indices of this rank's matrices."""
        return (
            range(self.bank.length) if self.inner is None else range(self.inner.rank, self.bank.length, self.inner.size)
        )

    @property
    def kept(self) -> int:
        """How many matrices this rank has, or entries of a flat bank."""
        return len(self.mine)

    @property
    def owned(self) -> Bank:
        """The bank as this rank's optimizer sees it: its matrices alone, each of them a parameter."""
        if self.inner is None:
            return self.bank
        named = list(_each(self.bank))
        places = tuple(named[k]._replace(at=at) for at, k in enumerate(self.mine))
        return Bank(self.bank.key, self.bank.dtype, self.bank.matrix, places, len(places), self.bank.blocks)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of something shaped like the whole bank, in leading dimensions at least; a view."""
        return whole if self.inner is None else whole[self.inner.rank :: self.inner.size]

    def leaving(self, parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What travels of the gradients `parts`, one a place: one tensor a piece, which waits for its layers alone."""
        if self.bank.matrix is None:
            return [self.bank.join(parts, dtype)]
        matrices = _matrices(self.bank, parts)
        nothing = torch.zeros_like(matrices[0])
        return [
            torch.stack([nothing if k is None else matrices[k] for k in self._order(p)]).to(dtype) for p in self.pieces
        ]

    def arrived(self, sums: Sequence[Tensor]) -> Tensor:
        """This rank's part of the gradient from what was reduced of its pieces."""
        if self.inner is None:
            return sums[0] if len(sums) == 1 else torch.cat(list(sums))
        mine = [
            s[: len(range(p.start + self.inner.rank, p.stop, self.inner.size))]
            for s, p in zip(sums, self.pieces, strict=True)
        ]
        return mine[0] if len(mine) == 1 else torch.cat(mine)

    def sent(self, owned: Tensor) -> list[Tensor]:
        """What this rank sends of its part, shaped like `owned` in the leading dimension: one tensor a piece."""
        assert self.inner is not None
        out, at = [], 0
        for piece in self.pieces:
            here = len(range(piece.start + self.inner.rank, piece.stop, self.inner.size))
            part = owned[at : at + here]
            if short := piece.each - here:
                # Matrices and no zeros: what a rank proves alone, it proves with its own in the place of all.
                part = torch.cat([part, owned[-1:].expand(short, *owned.shape[1:])])
            out.append(part.contiguous())
            at += here
        return out

    def whole(self, gathered: Sequence[Tensor]) -> Tensor:
        """The whole bank from what all ranks sent of their parts."""
        assert self.inner is not None
        parts = []
        for piece, both in zip(self.pieces, gathered, strict=True):
            by_rank = both.view(self.inner.size, piece.each, *both.shape[1:])
            parts.append(by_rank.transpose(0, 1).reshape(-1, *both.shape[1:])[: piece.stop - piece.start])
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def views(self, gathered: Sequence[Tensor]) -> dict[str, Tensor]:
        """The whole parameters of the bank, by full name, from what all ranks sent of their parts: views of that, so
        that each piece can be freed behind its last use."""
        assert self.inner is not None
        size = self.inner.size
        matrices: list[Tensor] = []
        for piece, both in zip(self.pieces, gathered, strict=True):
            by_rank = both.view(size, piece.each, *both.shape[1:])
            matrices += [by_rank[k % size, k // size] for k in range(piece.stop - piece.start)]
        return dict(zip((p.name for p in self.bank.places), self.bank.placed(matrices), strict=True))

    def first_names(self) -> list[str]:
        """For each piece, the parameter in it that the forward uses first, whose gradient is ready last."""
        if self.bank.matrix is None:
            return [self.bank.places[0].name]
        counts = zip(self.bank.places, self.bank.matrices, strict=True)
        names = [place.name for place, count in counts for _ in range(count)]
        return [names[piece.start] for piece in self.pieces]

    def _order(self, piece: Piece) -> Iterator[int | None]:
        """The matrices of a piece as they travel: all of one rank behind those of another; None for a filling."""
        if self.inner is None:
            yield from range(piece.start, piece.stop)
            return
        size = self.inner.size
        for rank in range(size):
            for i in range(piece.each):
                k = piece.start + i * size + rank
                yield k if k < piece.stop else None


def cut(bank: Bank, ranks: int, itemsize: int) -> tuple[Piece, ...]:
    """The pieces of `bank`, divided among so many ranks, whose entries travel in `itemsize` bytes."""
    if bank.matrix is None:
        return (Piece(0, bank.length, bank.length),)
    rounds = math.ceil(bank.length / ranks)
    fit = max(1, math.ceil(bank.length * bank.matrix[0] * bank.matrix[1] * itemsize / LEAST_BYTES))
    each = math.ceil(rounds / min(MOST, fit, rounds))
    found = []
    for start in range(0, bank.length, each * ranks):
        stop = min(start + each * ranks, bank.length)
        found.append(Piece(start, stop, math.ceil((stop - start) / ranks)))
    return tuple(found)


def parts_of(matrices: int, ranks: int) -> int:
    """Among how many neighbours of `ranks` a bank of so many matrices is divided: the largest divisor that leaves each
    of them one. What travels would otherwise be fillings for the most part."""
    return max(n for n in range(1, ranks + 1) if ranks % n == 0 and n <= max(1, matrices))


def _matrices(bank: Bank, parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a stacked bank, one a place, matrix by matrix."""
    assert bank.matrix is not None
    found: list[Tensor] = []
    for part, place, count in zip(parts, bank.places, bank.matrices, strict=True):
        in_order = part.permute(place.order) if place.order else part
        found += [in_order.reshape(bank.matrix)] if count == 1 else in_order.reshape(count, *bank.matrix).unbind(0)
    return found


def _each(bank: Bank) -> Iterator[Place]:
    """The places of a stacked bank, those of a stack one by one."""
    assert bank.matrix is not None
    for place, count in zip(bank.places, bank.matrices, strict=True):
        if count == 1:
            yield place
        else:
            yield from (Place(f"{place.name}[{i}]", bank.matrix, place.at + i) for i in range(count))
