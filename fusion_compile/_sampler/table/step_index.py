"""The row of a timestep, by the exact bits of `t` and never by a count of calls.

Serial guidance calls the model twice at one `t`, Heun returns to a `t`, and image-to-image starts in the middle of the
schedule. The bits of `t` are right in all of these cases.

The CPU may look at `t` (`look`), which on a GPU waits for the device, or the device looks the row up (`look_up`). The
device makes the output of an unknown `t` NaN. A flag and the value are copied to the CPU without waiting, and the first
call that sees the flag raises RuntimeError, so an image is never silently wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._sampler.read_back import ReadBack
from fusion_compile._sampler.rows import NAMED_ENTRIES

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Look:
    """The CPU's view of a timestep: its `row`, or None; whether all entries are `even`; the first `values`."""

    row: int | None
    even: bool
    values: list[float]


class StepIndex:
    """Rows of timesteps that have the dtype and device of `t`. `len()`: rows in use, which are 0 to ``len() - 1``.

    A model with several clocks (a timestep and a sigma, the time of a video and that of its sound) has `more` of them:
    each row is then for one value of every clock, and each method takes them in this order.

    `capacity`: rows that there is room for. It doubles when all are in use, up to `most`; then the least recently used
    row is given away.
    """

    def __init__(self, t: Tensor, capacity: int, most: int, *more: Tensor) -> None:
        self.capacity, self.most = capacity, most
        self._bits = [_bits(clock.new_empty(capacity)) for clock in (t, *more)]
        self._rows: dict[tuple[int, ...], int] = {}  # bits -> row, the least recently used first
        self._missed: tuple[Tensor, Tensor] | None = None  # a flag [], and the first entries of the unknown t
        self._values, self._flag = ReadBack(), ReadBack()

    def __len__(self) -> int:
        return len(self._rows)

    def look_up(self, *t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(row [1] int64, known [] bool)`` for `t` of any shape, on its device; needs a row in use.

        Known means that all entries of `t` are one entry of the schedule. An unknown `t` gives row 0.
        Raises RuntimeError when an earlier call of this method had an unknown `t`.
        """
        self._raise_if_missed()
        clocks = zip(t, self._bits, strict=True)
        found = [(_bits(clock).reshape(-1, 1) == bits[: len(self)]).all(dim=0) for clock, bits in clocks]
        matches, *others = found
        for other in others:
            matches = matches & other
        known = matches.any()
        self._note(_named(t), known)
        return matches.to(torch.uint8).argmax().reshape(1), known

    def look(self, *t: Tensor) -> Look:
        """Read `t` on the CPU; waits for the device that it is on."""
        values = self._values.now(*(clock.reshape(-1) for clock in t))
        bits = [_bits(clock) for clock in values]
        even = all(bool((each == each[0]).all()) for each in bits)
        key = tuple(int(each[0]) for each in bits)
        row = self._rows.get(key) if even else None
        if row is not None:
            self._rows[key] = self._rows.pop(key)
        return Look(row, even, _named(values).tolist())

    def row_of(self, *value: Tensor) -> int | None:
        """The row of values ``[]`` that lie on the CPU, or None."""
        return self._rows.get(tuple(int(_bits(one)) for one in value))

    def reserve(self, *t: Tensor, keep: Collection[int] = ()) -> int:
        """Give `t`, which has no row and whose entries are equal, a new row, or the least recently used row not in
        `keep`."""
        if len(self) == self.capacity < self.most:
            self.make_room(min(2 * self.capacity, self.most), self.most)
        row = len(self)
        if row == self.capacity:
            oldest = next(bits for bits, r in self._rows.items() if r not in keep)
            row = self._rows.pop(oldest)
        ones = [_bits(clock).reshape(-1)[:1] for clock in t]
        for bits, one in zip(self._bits, ones, strict=True):
            bits[row : row + 1].copy_(one)
        self._rows[tuple(map(int, self._values.now(*ones)))] = row
        return row

    def make_room(self, capacity: int, most: int) -> None:
        """Have room for at least `capacity` rows, and let it grow to `most`."""
        self.most = max(self.most, most)
        if capacity > self.capacity:
            self._bits = [torch.cat([bits, bits.new_empty(capacity - self.capacity)]) for bits in self._bits]
            self.capacity = capacity

    def _note(self, values: Tensor, known: Tensor) -> None:
        if self._missed is None or self._missed[1].shape != values.shape:
            self._missed = (torch.zeros_like(known), torch.zeros_like(values))
        flag, first = self._missed
        first.copy_(torch.where(flag | known, first, values))
        flag |= ~known
        self._flag.later(flag, first)

    def _raise_if_missed(self) -> None:
        arrived = self._flag.arrived()
        if arrived is not None and bool(arrived[0]):
            values = arrived[1].tolist()
            arrived[0].zero_()
            self._missed = None
            raise UnknownTimestep(values)


class UnknownTimestep(RuntimeError):
    """A trusted caller asked for a timestep without a row; `values` are its first entries."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(
            f"an earlier call asked for timestep {values}, which has no row in the sampler's table, after two whole "
            f"schedules without an unknown one; its output is NaN. From now on every timestep is checked: repeat that "
            f"image, or pass timesteps= or prepare(timesteps=...) with all values the scheduler uses."
        )
        self.values = values


def _named(t: Sequence[Tensor]) -> Tensor:
    """The first entries of one clock, or the first entry of each of several."""
    if len(t) == 1:
        return t[0].detach().reshape(-1)[:NAMED_ENTRIES]
    return torch.cat([clock.detach().reshape(-1)[:1].double() for clock in t])


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(_BITS[t.element_size()]) if t.is_floating_point() else t.detach()
