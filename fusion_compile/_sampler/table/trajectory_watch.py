"""Where a trajectory starts, and when the CPU may stop looking at the timestep.

On a CPU looking is free. On a GPU it makes the CPU wait, so `t` is read on the CPU until two whole schedules contained
no unknown value; then the device looks rows up. A trusted caller who asks for an unknown `t`, and a caller whose `t` a
fixed schedule does not hold, is never trusted again.

A trusted caller is still looked at where a trajectory should start, which is after as many calls as the last trajectory
had, until its second row: there the weights are compared anyhow, and a new schedule shows. ``verify="never"`` does not
look there either.
"""

from __future__ import annotations

from typing import Literal

Verify = Literal["trajectory", "always", "never"]


class TrajectoryWatch:
    """Follows the calls of one program. A `request` is any object that stands for one; None is a new request."""

    def __init__(self, *, look_always: bool, verify: Verify) -> None:
        self._look_always = look_always or verify == "always"
        self._looks_at_starts = verify != "never"
        self._distrusted = False
        self._hits = 0
        self._row: int | None = None  # of the last call, if the CPU knows it
        self._first: tuple[int, object] | None = None  # row and request of the trajectory's first call
        self._calls = 0  # of this trajectory
        self._length = 0  # calls of the last trajectory
        self._aligned = True

    def must_look(self, request: object, n_rows: int) -> bool:
        """Whether the CPU has to look at the timestep of the next call, which is for `request`."""
        if self._look_always or self._distrusted or self._hits < 2 * n_rows or n_rows == 0:
            return True
        if not self._looks_at_starts:
            return False
        only_first_row = self._first is not None and self._row == self._first[0]
        return request is None or not self._aligned or only_first_row or self._calls >= self._length

    def count_seen(self, row: int, request: object, *, new: bool) -> bool:
        """Count a call whose row the CPU knows; return whether a trajectory starts with it. `new`: so is `request`."""
        self._hits += 1
        first_row, first_request = self._first or (row, request)
        if self._row is None:  # the first call, or one after calls that were not looked at
            starts = True
            self._aligned = row == first_row
        else:
            starts = row < self._row or (row == first_row and (new or request is first_request))
            self._aligned |= starts
        if starts and self._aligned:
            self._length = max(1, self._calls)
            self._first = (row, request)
            self._calls = 0
        self._row = row
        self._calls += 1
        return starts

    def count_unseen(self) -> None:
        """Count a call that the CPU did not look at."""
        self._row = None
        self._calls += 1

    def note_learned(self) -> None:
        """A timestep without a row gets one: count hits from the start."""
        self._hits = -1  # the call itself is counted after this

    def distrust(self) -> None:
        """Look at every call from now on."""
        self._distrusted = True
