"""A range of timesteps that is served whole: what a step index and a watch over passes are where nothing has rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._sampler.table.step_index import Seen

_NAMED = 4  # entries of an unserved t that a message tells


@dataclass(frozen=True)
class TimestepRange:
    """Timesteps from `low` to `high`, both included, in the units of the model's argument."""

    low: float
    high: float

    def in_dtype_of(self, like: Tensor) -> TimestepRange:
        """The range that holds every value of this one after a cast to the dtype of `like`."""
        low, high = torch.tensor([self.low, self.high], dtype=torch.float64).to(like.dtype).tolist()
        return TimestepRange(min(low, self.low), max(high, self.high))

    def samples(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`n` evenly spaced timesteps and those halfway between, in the dtype and on the device of `like`.

        Fewer where the dtype knows fewer; those halfway are none of the others, or, where nothing lies between, are
        the same.
        """
        grid = torch.linspace(self.low, self.high, n, dtype=torch.float64)
        halfway = (grid[1:] + grid[:-1]) / 2
        if not like.is_floating_point():
            grid, halfway = grid.round(), halfway.round()
        sampled, between = (torch.unique(t.to(like.dtype)) for t in (grid, halfway))
        between = between[~torch.isin(between.double(), sampled.double())]
        return sampled.to(like.device), (between if len(between) else sampled).to(like.device)


def range_to_fit(
    rank: int | None, t_range: tuple[float, float] | None, schedule: Tensor | None
) -> TimestepRange | None:
    """The range of rank mode: `t_range`, or that of `schedule`; None without a rank.

    Raises ValueError for a rank below 1, a range without a rank or a rank without a range, and a range of one timestep.
    """
    if rank is None:
        if t_range is not None:
            raise ValueError(f"t_range={t_range} is what rank= is fitted to; pass rank= too, or leave t_range out.")
        return None
    if rank < 1:
        raise ValueError(f"rank={rank}; a subspace has at least one dimension.")
    if t_range is None and schedule is None:
        raise ValueError(
            f"rank={rank} is fitted to a range of timesteps and none is known; pass t_range=(0, 1), (0, 999) or what "
            f"the model is given, or timesteps=."
        )
    ends = schedule.double() if t_range is None and schedule is not None else torch.tensor(t_range, dtype=torch.float64)
    low, high = float(ends.min()), float(ends.max())
    if not low < high:
        raise ValueError(f"the range of timesteps is [{low:g}, {high:g}]; pass t_range=(first, last) with two values.")
    return TimestepRange(low, high)


class RangeIndex:
    """A `StepIndex` of one row, 0, that every timestep of the range has. The host never waits for a device: of a `t`
    that is not on the CPU it believes that it is in the range."""

    capacity = 1

    def __init__(self, covers: TimestepRange) -> None:
        self._covers = covers

    def __len__(self) -> int:
        return 1

    def look(self, t: Tensor) -> Seen:
        """What the host sees in `t` of any shape."""
        if t.device.type != "cpu":
            return Seen(0, True, [])
        inside = bool(((t >= self._covers.low) & (t <= self._covers.high)).all())
        return Seen(0 if inside else None, False, t.reshape(-1)[:_NAMED].tolist())

    def find(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(row [1], True [])``."""
        return torch.zeros(1, dtype=torch.int64, device=t.device), torch.ones((), dtype=torch.bool, device=t.device)

    def row_of(self, value: Tensor) -> int:
        """0."""
        return 0

    def place(self, t: Tensor, keep: Collection[int] = ()) -> int:
        """0."""
        return 0

    def make_room(self, capacity: int, most: int) -> None:
        """Nothing."""


class CallCount:
    """A `PassWatch` that knows a pass by its length alone: one begins with each new request, and every `n_steps` calls
    for the same one."""

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._first: object = None
        self._calls = 0

    def must_look(self, slot: object, n_rows: int) -> bool:
        """True; see `RangeIndex.look`."""
        return True

    def seen(self, row: int, slot: object, *, new: bool) -> bool:
        """Note a call; whether a pass begins with it."""
        if new or self._first is None or (slot is self._first and self._calls == self._n_steps):
            self._first, self._calls = slot, 0
        elif slot is not self._first:
            return False
        self._calls += 1
        return self._calls == 1

    def missed(self, *, fixed: bool) -> None:
        """Nothing."""

    def trusted(self) -> None:
        """Nothing."""

    def distrust(self) -> None:
        """Nothing."""
