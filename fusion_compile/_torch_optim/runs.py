"""A flat bank as runs of parameters that follow each other: a large one by itself, small ones together.

The gradient of a large parameter is read where it lies. Those of a run of small ones are copied together, shortly
before they are used, into one place that all runs share, so that they are still in the cache then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._state.banks import Bank, Layout
from fusion_compile._state.routing import Route
from fusion_compile._torch_optim.piecewise import COLUMNS
from fusion_compile.optim._transform import Place

LARGE = 1 << 18
"""Bytes from which a gradient is read where it lies: a call of a program costs the host what their copy costs."""
_TOGETHER = 1 << 19
"""Bytes of a run of small gradients: half of the second cache of a usual core, which holds weights and moments too."""


class Run(NamedTuple):
    """Parameters that follow each other in the bank `bank`, from entry `first` to `last`.

    `places`: where their gradients are copied to, in the parameters' shapes; none where the one gradient is read where
    it lies. `gradient`: all of these, ``[rows, 16]``. `padding`: what lies between them, which is zero. `names`: of the
    members.
    """

    bank: Bank
    first: int
    last: int
    members: tuple[Place, ...]
    places: tuple[Tensor, ...] = ()
    padding: tuple[Tensor, ...] = ()
    gradient: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return (self.last - self.first) // COLUMNS


def large_first(routes: Sequence[Route], members: Mapping[str, nn.Parameter]) -> tuple[Route, ...]:
    """`routes` in an order in which small parameters follow each other."""
    return tuple(sorted(routes, key=lambda route: members[route.name].nbytes < LARGE))


class Runs:
    """The runs of a layout whose parameters all begin at multiples of 16 entries. They share the memory into which
    small gradients are copied."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._memory: dict[torch.dtype, Tensor] = {}

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Where small gradients lie during an update."""
        return tuple(self._memory.values())

    def of(self, missing: Collection[str]) -> list[Run]:
        """The runs without the parameters `missing`, in the bank's order.

        A backward ends with the gradients of the first layers, which are still in a cache then.
        """
        pieces = [(bank, *piece) for bank in self._layout.banks for piece in _pieces(bank, missing)]
        cut = [Run(*piece, names=tuple(place.name for place in piece[-1])) for piece in pieces]
        for run in cut:
            if not _lies(run):
                entries, known = run.last - run.first, self._memory.get(run.bank.dtype)
                if known is None or known.numel() < entries:
                    made = torch.zeros(entries, dtype=run.bank.dtype, device=self._layout.device)
                    self._memory[run.bank.dtype] = made
        return [run if _lies(run) else self._with_places(run) for run in cut]

    def _with_places(self, run: Run) -> Run:
        memory = self._memory[run.bank.dtype][: run.last - run.first]
        at = [place.at - run.first for place in run.members]
        ends = [begin + place.numel for begin, place in zip(at, run.members, strict=True)]
        gaps = zip(ends, [*at[1:], run.last - run.first], strict=True)
        return run._replace(
            places=tuple(_shaped(memory[a:b], p) for a, b, p in zip(at, ends, run.members, strict=True)),
            padding=tuple(memory[a:b] for a, b in gaps if a < b),
            gradient=memory.view(-1, COLUMNS),
        )


def _pieces(bank: Bank, missing: Collection[str]) -> Iterator[tuple[int, int, tuple[Place, ...]]]:
    ends = [place.at for place in bank.places[1:]] + [bank.length]
    together: list[Place] = []
    begin = last = 0
    for place, end in zip(bank.places, ends, strict=True):
        here, large = place.name not in missing, _is_large(place, bank)
        if together and (not here or large or (end - begin) * bank.dtype.itemsize > _TOGETHER):
            yield begin, last, tuple(together)
            together = []
        if here and large:
            yield place.at, end, (place,)
        elif here:
            begin = begin if together else place.at
            together.append(place)
        last = end
    if together:
        yield begin, last, tuple(together)


def _is_large(place: Place, bank: Bank) -> bool:
    return place.numel * bank.dtype.itemsize >= LARGE and place.numel % COLUMNS == 0


def _lies(run: Run) -> bool:
    return len(run.members) == 1 and _is_large(run.members[0], run.bank)


def _shaped(part: Tensor, place: Place) -> Tensor:
    if not place.order:
        return part.view(place.shape)
    ordered = part.view([place.shape[axis] for axis in place.order])
    return ordered.permute([place.order.index(axis) for axis in range(len(place.order))])


def where_it_lies(gradient: Tensor, place: Place) -> Tensor:
    """A large gradient as ``[rows, 16]``: a view of it, unless it lies in another order than the bank."""
    if gradient.is_neg():  # a view of a complex tensor's conjugate, whose sign only torch's operators know
        gradient = gradient.resolve_neg()
    ordered = gradient.permute(place.order) if place.order else gradient
    if type(ordered) is not Tensor or not ordered.is_contiguous():
        plain = torch.empty(ordered.shape, dtype=ordered.dtype, device=ordered.device)
        ordered = plain.copy_(ordered)
    return ordered.view(-1, COLUMNS)
