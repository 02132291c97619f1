"""Which row of the table a timestep asks for: found on the device from the exact bits of `t`, never from a call count.

Serial guidance calls the model twice at one `t`, Heun returns to a `t`, image-to-image starts in the middle of the
schedule; the bits of `t` are right in all of them.

Whether `t` is in the schedule at all is known on the device. On a CPU the host may look at once. On a GPU looking makes
it wait, so the host looks while it gets to know its caller, until two schedules have passed without an unknown `t`,
and trusts it from then on: the body turns the output of an unknown `t` into NaN, a flag is copied to the host without
waiting, and the first call that sees it raised raises RuntimeError. A caller who was ever seen to ask for an unknown
`t` is never trusted. So an image is never silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StepIndex:
    """Rows of `schedule` ``[n_steps]``, which has the dtype and device of the `t` that will be asked for."""

    def __init__(self, schedule: Tensor, *, look_always: bool) -> None:
        self._bits = _bits(schedule)
        self._look_always = look_always
        self._distrusted = False
        self._hits_in_a_row = 0
        self._missed = torch.zeros((), dtype=torch.bool, device=schedule.device)
        self._seen = torch.zeros((), dtype=torch.bool, pin_memory=schedule.device.type == "cuda")
        self._event: Any = None  # a torch.cuda.Event once a flag was copied

    def find(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` of any shape -> (row ``[1]`` int64, known ``[]`` bool).

        Known means that all entries of `t` are one and the same entry of the schedule. An unknown `t` gives row 0. Of
        equal entries of the schedule the first is taken: their rows are the same.
        """
        bits = _bits(t).reshape(-1, 1)
        matches = (bits == self._bits).all(dim=0)
        return matches.to(torch.uint8).argmax().reshape(1), matches.any()

    def host_knows(self, known: Tensor) -> bool | None:
        """True or False when the host looked at `known`, None when it trusts the caller.

        Raises RuntimeError when an earlier call, made on trust, asked for an unknown `t`.
        """
        if self._look_always or self._distrusted or self._hits_in_a_row < 2 * len(self._bits):
            hit = bool(known)
            self._hits_in_a_row = self._hits_in_a_row + 1 if hit else 0
            self._distrusted |= not hit
            return hit
        self._raise_if_missed()
        self._missed |= ~known
        self._copy_flag()
        return None

    def _copy_flag(self) -> None:
        if self._missed.device.type != "cuda":
            self._seen.copy_(self._missed)
        elif self._event is None or self._event.query():
            self._seen.copy_(self._missed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def _raise_if_missed(self) -> None:
        if self._event is not None and not self._event.query():
            return
        if bool(self._seen):
            self._missed.zero_()
            self._seen.zero_()
            self._distrusted = True
            raise RuntimeError(
                "an earlier call asked for a timestep that is not in the sampler's schedule, after two whole schedules "
                "without one; its output is NaN. From now on every timestep is checked and unknown ones are served by "
                "the whole model: repeat that image, or pass timesteps= with all values the scheduler uses."
            )


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(_BITS[t.element_size()]) if t.is_floating_point() else t.detach()
