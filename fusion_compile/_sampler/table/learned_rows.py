"""The rows of a table: timesteps learned as they come, or those of a fixed schedule."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fusion_compile._sampler.rows import Assigned, Found, Learnable, Located, Seen, Unserved
from fusion_compile._sampler.table.step_index import Look, StepIndex, UnknownTimestep
from fusion_compile._sampler.table.trajectory_watch import TrajectoryWatch, Verify

MOST_SCHEDULES = 4
"""Schedules' worth of rows that a table grows to."""


class LearnedRows:
    """`Rows` of timesteps like `t`, with room for `n_steps` at first.

    `fixed`: the schedule was given, and a timestep outside of it gets no row. `more`: further clocks of the model. A
    schedule is then one of the first clock, and rows are learned as the others come.
    """

    def __init__(self, t: Tensor, n_steps: int, *, fixed: bool, verify: Verify, more: tuple[Tensor, ...] = ()) -> None:
        self._like, self._n_steps, self._fixed = t.detach(), n_steps, fixed
        self._n_scheduled, self._clocks = n_steps, 1 + len(more)
        self._scheduled: Tensor = t.new_empty(0, device="cpu")
        self.index = StepIndex(t, n_steps, MOST_SCHEDULES * n_steps, *more)
        self.trajectories = TrajectoryWatch(look_always=t.device.type == "cpu", verify=verify)

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self.index.capacity

    def __len__(self) -> int:
        return len(self.index)

    def locate(self, t: Tensor, request: object, *more: Tensor) -> Located:
        """The row of `t`, seen by the CPU or, for a trusted caller, looked up by the device."""
        if not self.trajectories.must_look(request, len(self)):
            self.trajectories.count_unseen()
            try:
                return Found(*self.index.look_up(t, *more))
            except UnknownTimestep:
                self.trajectories.distrust()
                raise
        look = self.index.look(t, *more)
        if look.row is not None:
            return Seen(look.row)
        if look.even and (not self._fixed or (more and look.values[0] in self._scheduled.tolist())):
            return Learnable(look.values, partial(self._learn, t, *more))
        self.trajectories.note_learned()
        self.trajectories.distrust()
        return self._unserved(look)

    def starts_trajectory(self, row: int, request: object, *, new: bool) -> bool:
        """Count a call of which the CPU knows the row; return whether a trajectory starts with it."""
        return self.trajectories.count_seen(row, request, new=new)

    def without_row(self, values: Tensor) -> list[float]:
        """The values of `values` ``[n]`` that have no row."""
        return [float(value) for value in values if self._clocks == 1 and self.index.row_of(value) is None]

    def assign(self, values: Tensor) -> Assigned:
        """Rows for a schedule; only rows outside of it are given away."""
        self._n_scheduled, self._scheduled = len(values), values
        self.index.make_room(len(values), MOST_SCHEDULES * max(self._n_steps, len(values)))
        if self._clocks > 1:
            return Assigned([], {})
        kept = {row for value in values if (row := self.index.row_of(value)) is not None}
        rows: list[int] = []
        fresh: dict[int, Tensor] = {}
        for value in values:
            row = self.index.row_of(value)
            if row is None:
                t = value.to(self._like.device).expand(self._like.shape)
                row = self.index.reserve(t, keep=kept)
                kept.add(row)
                fresh[row] = t
            rows.append(row)
        return Assigned(rows, fresh)

    def has_only(self, values: Tensor) -> bool:
        """Whether no row is for a timestep outside of `values` ``[n]``."""
        return self._clocks == 1 and len({self.index.row_of(value) for value in values} - {None}) == len(self)

    def _learn(self, *t: Tensor) -> int:
        self.trajectories.note_learned()
        return self.index.reserve(*t)

    def _unserved(self, look: Look) -> Unserved:
        if not look.even:
            return Unserved(
                look.values,
                "uneven t",
                "differs within one call, and a row of a table is for one timestep",
                "Call once for each timestep",
            )
        return Unserved(
            look.values,
            "unknown t",
            f"is not in the sampler's schedule of {self._n_scheduled} steps",
            "Pass timesteps= with the values that the model is given",
        )
