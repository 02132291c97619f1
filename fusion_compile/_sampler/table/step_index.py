"""Which row of the table a timestep asks for: found from the exact bits of `t`, never from a call count.

Serial guidance calls the model twice at one `t`, Heun returns to a `t`, image-to-image starts in the middle of the
schedule; the bits of `t` are right in all of them.

The host may look (`look`), which on a GPU waits for `t`, or trust its caller (`find`): then the row is found on the
device, the output of an unknown `t` becomes NaN, a flag and the value are copied to the host without waiting, and the
first call that sees the flag raises RuntimeError. So an image is never silently wrong. `PassWatch` says when to trust.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._sampler.read_back import ReadBack

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 4  # entries of an unknown t that a message tells


@dataclass(frozen=True)
class Seen:
    """What the host saw in a timestep: its `row`, None if it has none; whether all entries are `even`; the first
    `values`, as Python numbers."""

    row: int | None
    even: bool
    values: list[float]


class StepIndex:
    """Rows of timesteps that have the dtype and device of `t`. `len()`: rows in use, which are 0 to ``len() - 1``.

    `capacity`: rows there is room for; it doubles when they are all in use, up to `most`, and then the row that was
    not asked for longest is given away.
    """

    def __init__(self, t: Tensor, capacity: int, most: int) -> None:
        self.capacity, self.most = capacity, most
        self._bits = _bits(t.new_empty(capacity))
        self._rows: dict[int, int] = {}  # bits -> row, the least recently used first
        self._missed: tuple[Tensor, Tensor] | None = None  # a flag [], and the first entries of the unknown t
        self._look, self._flag = ReadBack(), ReadBack()

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` of any shape -> (row ``[1]`` int64, known ``[]`` bool), on the device of `t`; needs a row in use.

        Known means that all entries of `t` are one and the same entry of the schedule. An unknown `t` gives row 0.
        Raises RuntimeError when an earlier call of this method asked for an unknown `t`.
        """
        self._raise_if_missed()
        matches = (_bits(t).reshape(-1, 1) == self._bits[: len(self)]).all(dim=0)
        known = matches.any()
        self._note(t.detach().reshape(-1)[:_NAMED], known)
        return matches.to(torch.uint8).argmax().reshape(1), known

    def look(self, t: Tensor) -> Seen:
        """What the host sees in `t`; waits for the device that `t` is on."""
        (values,) = self._look.now(t.reshape(-1))
        bits = _bits(values)
        even = bool((bits == bits[0]).all())
        key = int(bits[0])
        row = self._rows.get(key) if even else None
        if row is not None:
            self._rows[key] = self._rows.pop(key)
        return Seen(row, even, values[:_NAMED].tolist())

    def row_of(self, value: Tensor) -> int | None:
        """The row of a value ``[]`` that lies on the CPU, None if it has none."""
        return self._rows.get(int(_bits(value)))

    def place(self, t: Tensor, keep: Collection[int] = ()) -> int:
        """Give `t`, all of whose entries are equal and have no row, a row: a new one, or the one not used for longest
        that is not in `keep`."""
        if len(self) == self.capacity < self.most:
            self.make_room(min(2 * self.capacity, self.most), self.most)
        row = len(self)
        if row == self.capacity:
            oldest = next(bits for bits, r in self._rows.items() if r not in keep)
            row = self._rows.pop(oldest)
        one = _bits(t).reshape(-1)[:1]
        self._bits[row : row + 1].copy_(one)
        (value,) = self._look.now(one)
        self._rows[int(value)] = row
        return row

    def make_room(self, capacity: int, most: int) -> None:
        """Have room for at least `capacity` rows, and let it grow to `most`."""
        self.most = max(self.most, most)
        if capacity > self.capacity:
            self._bits = torch.cat([self._bits, self._bits.new_empty(capacity - self.capacity)])
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
    """A caller that was trusted asked for a timestep without a row; `values` are its first entries."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(
            f"an earlier call asked for timestep {values}, which has no row in the sampler's table, after two whole "
            f"schedules without an unknown one; its output is NaN. From now on every timestep is checked: repeat that "
            f"image, or pass timesteps= or prepare(timesteps=...) with all values the scheduler uses."
        )
        self.values = values


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(_BITS[t.element_size()]) if t.is_floating_point() else t.detach()
