"""The rows of rank conditioning: one, which serves every timestep of a range."""

from __future__ import annotations

from torch import Tensor

from fusion_compile._sampler.rank.timestep_range import TimestepRange
from fusion_compile._sampler.rows import NAMED_ENTRIES, Assigned, Located, Seen, Unserved


class RangeRows:
    """`Rows` whose one row, 0, serves every timestep of `asked`, after a cast to the dtype of `t`.

    The CPU never waits for a device: it takes a `t` that lies on another device to be in the range. A trajectory is
    known by its length alone: one starts with each new request, and every `n_steps` calls for the same request.
    """

    capacity = 1

    def __init__(self, asked: TimestepRange, t: Tensor, n_steps: int) -> None:
        self._asked, self._covers, self._n_steps = asked, asked.in_dtype_of(t), n_steps
        self._first: object = None  # request that the trajectory started with
        self._calls = 0

    def __len__(self) -> int:
        return 1

    def locate(self, t: Tensor, request: object, *more: Tensor) -> Located:
        """Row 0, or why the whole model must serve `t`, which may differ within a call."""
        if t.device.type != "cpu" or bool(((t >= self._covers.low) & (t <= self._covers.high)).all()):
            return Seen(0)
        return Unserved(
            t.reshape(-1)[:NAMED_ENTRIES].tolist(),
            "outside t",
            f"is outside of [{self._asked.low:g}, {self._asked.high:g}], which conditioning=Rank(…) was fitted to",
            "Pass Rank(…, range=) with the first and the last timestep that the model is given",
        )

    def starts_trajectory(self, row: int, request: object, *, new: bool) -> bool:
        """Count a call; return whether a trajectory starts with it."""
        if new or self._first is None or (request is self._first and self._calls == self._n_steps):
            self._first, self._calls = request, 0
        elif request is not self._first:
            return False
        self._calls += 1
        return self._calls == 1

    def without_row(self, values: Tensor) -> list[float]:
        """Nothing: every timestep has row 0."""
        return []

    def assign(self, values: Tensor) -> Assigned:
        """Row 0 for each of `values` ``[n]``."""
        return Assigned([0] * len(values), {})

    def has_only(self, values: Tensor) -> bool:
        """True: the row is for any timestep."""
        return True
