"""The weights that the model shows, where they are gathered every so many steps and not in each (``publish_every=``).

With Schedule-Free a loss sees the gradient point, which every step gathers, and nobody needs the average x between two
evaluations. Each rank then keeps its part of x in the state, and the model shows x of the last publication.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._ranks.division import Division
from fusion_compile._state.residence import Residence
from fusion_compile._step.lifetime import Lifetime
from fusion_compile._step.pure_step import StepPlan
from fusion_compile._types import Tensors


class Publishes(Lifetime):
    """The part of a step that publishes weights. `_behind`: steps since the last time."""

    _plan: StepPlan
    _behind = 0

    def publish(self) -> None:
        """Let the model show the weights of now; all ranks call this together.

        It is needed with ``publish_every=`` alone; otherwise the model shows them anyway.

        Raises:
            RuntimeError: The step was released, or ranks do not call this together.

        Example:
            >>> import torch, fusion_compile as fc
            >>> model = torch.nn.Linear(4, 2)
            >>> step = fc.compile_training_step(model, lambda model, x: model(x).square().mean(), mode="eager")
            >>> step.publish()
        """
        with self._together("publishes its weights"), self._turn:
            self._check_whole()
            self._meet_and_publish("publishes its weights")

    def _meet_and_publish(self, act: str) -> None:
        """Inside of `act`, which all ranks do: let the model show the weights of now, if it does not."""
        if self._is_behind():
            assert self._meeting is not None
            self._meeting.meet(act)
            self._publish()

    def _is_behind(self) -> bool:
        return self._publishing() is not None and self._behind > 0

    def _publishing(self) -> Division | None:
        division = self._plan.division
        return division if division is not None and division.publishes and division.divided else None

    def _publish(self) -> None:
        """The same where ranks have met."""
        division = self._publishing()
        if division is None or not self._behind:
            return
        with torch.no_grad():
            for key, bank in division.gathered(division.deployed(self._state)).items():
                self._residence.banks[key].copy_(bank)
        self._behind = 0
        self._residence.say_written()
        self._versions_seen = self._residence.versions()

    def _stepped(self) -> None:
        """A step was taken, on all ranks."""
        if self._publishing() is not None:
            self._behind += 1
            if self._behind >= self._plan.options.publish_every:
                self._publish()

    def _take_written(self) -> None:
        """Take what somebody wrote into the model's weights. Raises RuntimeError where they are not those of now."""
        division = self._publishing()
        if division is None:
            return
        if not self._behind:
            take(division, self._state, self._residence)
        elif names := sorted(self._residence.written()):
            raise RuntimeError(
                f"{names[0]} was written, and the model shows the weights of {self._behind} steps ago "
                f"(publish_every={self._plan.options.publish_every}), so that the other entries would go back to "
                f"those. Call step.publish() on all ranks, then write."
            )


def take(division: Division, state: Tensors, residence: Residence) -> None:
    """Copy this rank's matrices of what the model shows into `state`."""
    with torch.no_grad():
        for key, part in division.deployed(state).items():
            shown: Tensor = residence.banks[key]
            part.copy_(division.shares[key].own(shown))
