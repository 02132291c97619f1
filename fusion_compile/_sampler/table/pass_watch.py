"""Where a pass over the schedule begins, and when the host may stop looking at the timestep.

On a CPU the host may look at once. On a GPU looking makes it wait, so the host looks while it gets to know its caller,
until two schedules have passed without an unknown `t`, and trusts it from then on. A caller who was trusted and asked
for an unknown `t`, or asked for one that a fixed schedule does not hold, is never trusted again.

A trusted caller is looked at where a pass should begin, which is after as many calls as the last pass took, until a
second row was seen: there the weights are compared anyhow, and a new schedule shows. ``verify="never"`` waits for
nothing and does not look there either.
"""

from __future__ import annotations

from typing import Literal

Verify = Literal["pass", "always", "never"]


class PassWatch:
    """Follows the calls of one program. A `slot` is any object that stands for a request; None is a new one."""

    def __init__(self, *, look_always: bool, verify: Verify) -> None:
        self._look_always = look_always or verify == "always"
        self._looks_at_starts = verify != "never"
        self._distrusted = False
        self._hits = 0
        self._row: int | None = None  # of the last call, if the host knows it
        self._first: tuple[int, object] | None = None  # row and slot of the pass's first call
        self._calls = 0  # of this pass
        self._length = 0  # calls of the last pass
        self._aligned = True

    def must_look(self, slot: object, n_rows: int) -> bool:
        """Whether the host has to look at the timestep of the next call, which is for `slot`."""
        if self._look_always or self._distrusted or self._hits < 2 * n_rows or n_rows == 0:
            return True
        if not self._looks_at_starts:
            return False
        only_first_row = self._first is not None and self._row == self._first[0]
        return slot is None or not self._aligned or only_first_row or self._calls >= self._length

    def seen(self, row: int, slot: object, *, new: bool) -> bool:
        """Note a call whose row the host knows; whether a pass begins with it. `new`: `slot` is a new request's."""
        self._hits += 1
        first_row, first_slot = self._first or (row, slot)
        if self._row is None:  # the first call, or one after calls that were not looked at
            begins = True
            self._aligned = row == first_row
        else:
            begins = row < self._row or (row == first_row and (new or slot is first_slot))
            self._aligned |= begins
        if begins and self._aligned:
            self._length = max(1, self._calls)
            self._first = (row, slot)
            self._calls = 0
        self._row = row
        self._calls += 1
        return begins

    def missed(self, *, fixed: bool) -> None:
        """Note a call whose timestep had no row. `fixed`: and gets none."""
        self._hits = -1  # the call itself is noted once its row is learned
        self._distrusted |= fixed

    def trusted(self) -> None:
        """Note a call that was not looked at."""
        self._row = None
        self._calls += 1

    def distrust(self) -> None:
        """Look always from now on."""
        self._distrusted = True
