"""The whole weights of a step of which each rank keeps its own matrices alone between steps (``shard="full"``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fusion_compile._ranks.division import FULL, Division
from fusion_compile._state.half_precision import forget_lost
from fusion_compile._state.residence import Residence
from fusion_compile._step.publishes import Publishes, take
from fusion_compile._step.together import contents
from fusion_compile._types import Tensors


class WholeWeights(Publishes):
    """The part of a step that lets whole weights be seen."""

    model: nn.Module

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Inside, every rank has the whole weights in the model; all ranks enter together.

        It is needed with ``shard="full"`` alone, where a rank keeps its own matrices between steps and the other
        parameters refuse to be read. With every other form, and without ``mesh=``, the model has them anyway. Evaluate,
        save and copy the model here, or write weights, on every rank alike. Steps are taken outside.

        Yields:
            The model. Tensors taken from it stay as they are after the end.

        Raises:
            RuntimeError: Ranks do not enter together, or the step was released.

        Example:
            >>> import torch, fusion_compile as fc
            >>> step = fc.compile_training_step(
            ...     torch.nn.Linear(4, 2), lambda model, x: model(x).square().mean(), mode="eager"
            ... )
            >>> with step.gathered() as model:
            ...     model.weight.shape
            torch.Size([2, 4])
        """
        with self._together("gathers its weights"), self._turn:
            self._check_whole()
            division = self._divides_weights()
            self._meet_and_publish("gathers its weights")
            if division is not None:
                assert self._meeting is not None
                self._meeting.meet("gathers its weights")
                fill(division, self._state, self._residence)
        self._shows_whole = True
        versions = self._residence.versions()
        try:
            yield self.model
        finally:
            self._shows_whole = False
            if division is not None and not self._released:
                with self._turn:
                    self._give_up(division, written=self._residence.versions() != versions)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Inside of something that ranks do together, and have met for: the model has the whole weights, to be read."""
        division = self._divides_weights()
        if division is None:
            self._publish()
            yield
            return
        fill(division, self._state, self._residence)
        try:
            yield
        finally:
            if not self._residence.moved_out:
                self._residence.empty(division.divided)

    @contextlib.contextmanager
    def _room_for_whole(self) -> Iterator[None]:
        """Inside, the model has memory for whole weights, all of which are written there. After an error nothing has
        changed."""
        division = self._divides_weights()
        if division is None:
            yield
            self._behind = 0
            self._take_written()
            return
        device = self._residence.layout.device
        shares = division.divided.items()
        self._residence.fill({k: torch.empty(s.bank.shape, dtype=s.bank.dtype, device=device) for k, s in shares})
        try:
            yield
            take(division, self._state, self._residence)
        finally:
            self._residence.empty(division.divided)

    def _move_out(self) -> None:
        """Give the model memory of its own again. Where no rank has whole weights, all do this together."""
        if self._is_behind():
            self.publish()
        if self._divides_weights() is None:
            self._residence.move_out()
            return
        with self._together("is released"):
            assert self._meeting is not None
            self._meeting.meet("is released")
            with self._whole():
                self._residence.move_out()

    def _divides_weights(self) -> Division | None:
        division = self._plan.division
        return division if division is not None and division.form == FULL and division.divided else None

    def _give_up(self, division: Division, *, written: bool) -> None:
        """Keep this rank's matrices alone. What was `written` is compared with other ranks' before the next act."""
        if written:
            self._residence.check(frozen=False)
            views = self._residence.layout.views(self._residence.banks)
            names = self._residence.written()
            self._written_whole = contents({name: views[name] for name in sorted(names)})
            forget_lost(division.owned, self._state, division.owned_names(names))
        take(division, self._state, self._residence)  # also what was written through .data, which nobody sees
        self._residence.empty(division.divided)


def fill(division: Division, state: Tensors, residence: Residence) -> None:
    """Gather the weights that the module shows, on all ranks together, and put them into the model."""
    with torch.no_grad():
        residence.fill(division.gathered(division.deployed(state)))
