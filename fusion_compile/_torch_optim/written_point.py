"""Writes into parameters while they hold Schedule-Free's y: WGAN's clamp of the weights, a projection, pruning.

A step computes the next y from x and z, so such a write would be lost. An optimizer that keeps y and z, as
``schedulefree`` does, takes it: y is what was written, z stays, and x follows by the write over β. So does this one.

A write raises the parameter's version. One through ``.data`` does not, and no number in memory tells it but y itself.
So some entries of each parameter are compared in every step (`Samples`). What they miss, a write of a few entries, is
looked for by computing y again: at the second step, at every 32nd, and at each from the first such find on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion_compile._state import keys
from fusion_compile._step.update import UpdatePlan
from fusion_compile._step.written import Written, refuse_other_points, with_written_point
from fusion_compile._torch_optim.samples import Samples
from fusion_compile._torch_optim.torch_words import points_of
from fusion_compile._types import Tensors

EVERY = 32
"""Steps between two looks at all entries for a write through ``.data``, while none was found."""
_ROOM = 32
"""Units in the last place of x and y by which y computed again may differ: another program rounds otherwise."""


class WrittenPoint:
    """Finds what was written into the parameters of one group that hold y, and takes it up. `samples`: of these.

    Attributes:
        seen: Whether a write was found that neither a version nor, in time, a sample told.
        looked: The group's step count when y was last compared.
    """

    def __init__(self, samples: Samples) -> None:
        self.seen = False
        self.looked = 0
        self._samples = samples
        self._sampled = False
        self._flags: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._follows: bool | None = None

    def note(self) -> None:
        """The parameters are what the optimizer left in them."""
        self._samples.note()

    def is_due(self, steps: int) -> bool:
        """Whether a look is due before the step after `steps` steps."""
        differ = self._samples.differ()
        self._sampled = differ is not None and differ.device.type != "cuda" and bool(differ)
        if differ is not None and differ.device.type == "cuda":
            self._note(differ)  # nobody waits for it: it is known at the next step, and said then
        self._read_flags()
        return self._sampled or self.seen or steps == 1 or steps - self.looked >= EVERY

    def take_up(
        self, plan: UpdatePlan, state: Tensors, members: Mapping[str, nn.Parameter], steps: int, *, told: str | None
    ) -> str:
        """Let x in `state` follow what was written into `members`. Waits for no device.

        `told`: the name of a parameter whose version tells a write. Returns what to say: that writes were lost, or that
        they cannot be taken up, because the transform's point does not follow x in a straight line.
        """
        context = plan.context(state)
        found_now = told is not None or self._sampled
        knew, lost = self.seen or found_now, steps - self.looked - 1
        self.looked = steps
        point = plan.gradient_point(state, context)
        at, x = plan.layout.views(point), plan.layout.views(plan.params(state))
        written, found = {}, []
        for name, p in members.items():
            off = _differs(p.detach(), at[name], x[name])
            found.append(off.any())
            shown = at[name].to(p.dtype)
            written[name] = Written(shown, torch.where(off, p.detach(), shown))
        if not found_now:
            self._note(torch.stack(found).any())
        if self._follows is None:
            self._follows = _follows(plan, state, members)
        if self._follows:
            moved = with_written_point(plan, state, point, written, context)
            for bank in plan.layout.banks:
                state[keys.params(bank.key)].copy_(moved[keys.params(bank.key)])
        self._read_flags()
        if (self.seen or found_now) and not self._follows:
            return _overwritten(told, points_of(plan.transform)[0])
        return _found_late(lost, points_of(plan.transform)[0]) if self.seen and not knew and lost > 0 else ""

    def _note(self, found: Tensor) -> None:
        if found.device.type != "cuda":
            self._flags.append((found, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(found, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(found.device))
        self._flags.append((host, arrived))

    def _read_flags(self) -> None:
        while self._flags and (self._flags[0][1] is None or self._flags[0][1].query()):  # type: ignore[no-untyped-call]
            self.seen |= bool(self._flags.pop(0)[0])


def _differs(held: Tensor, at: Tensor, x: Tensor) -> Tensor:
    """Which entries of a parameter are other than rounding makes them. Of a number that is none, nothing is known."""
    size = at.abs() + x.abs()
    room = _ROOM * torch.finfo(at.dtype).eps * size
    if held.dtype != at.dtype:
        room = room + torch.finfo(held.dtype).eps * size
    return (held.to(at.dtype) - at).abs() > room


def _follows(plan: UpdatePlan, state: Tensors, members: Mapping[str, nn.Parameter]) -> bool:
    try:
        refuse_other_points(plan, state, members)
    except ValueError:
        return False
    return True


def _overwritten(name: str | None, there: str) -> str:
    """What to say of a write that cannot be taken up. `name`: a parameter's, where a version told it."""
    return (
        f"{name or 'a parameter'} was written to while the parameters hold {there}; it is overwritten now. "
        f"Call optimizer.eval() first, write, then call optimizer.train()."
    )


def _found_late(steps: int, there: str) -> str:
    """What to say of a write that was found after so many steps without a look."""
    return (
        f"parameters were written to through .data, which leaves no trace, while they hold {there}. This "
        f"write counts; those of the {steps} steps before it, if there were any, are lost. From now on each step "
        f"looks. Write under torch.no_grad() and without .data, and every one counts."
    )
