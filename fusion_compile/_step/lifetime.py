"""When a training step may be called: not after its release, not in inference mode or beside other ranks, and in the
model's first mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fusion_compile._ranks.meeting import Meeting
from fusion_compile._state.half_precision import forget_lost
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.residence import Residence
from fusion_compile._step.background import Background
from fusion_compile._step.models import several_ranks
from fusion_compile._step.together import contents
from fusion_compile._step.turn import Turn
from fusion_compile._types import Tensors


class Lifetime:
    """What a step refuses because of when it is asked. `model`: in the mode in which the step is compiled.

    `residence`: where the model's parameters lie.
    """

    hyperparameters: Hyperparameters
    steps_called: int

    def __init__(self, model: nn.Module, residence: Residence) -> None:
        self._training = model.training
        self._residence = residence
        self._released = False
        self._state: Tensors = {}
        self._turn = Turn(lambda: self._state)
        self._background = Background()
        self._meeting: Meeting | None = None
        self._versions_seen = 0
        self._shows_whole = False
        self._written_whole: dict[str, int] = {}

    def _check_whole(self, *, torn: bool = False) -> None:
        """Refuse to save or load where the state is gone, or the model's parameters are no longer the trained ones.

        `torn`: whether a state that was written by half will do.
        """
        self._check_alive()
        self._residence.check(frozen=False)
        if not torn:
            self._turn.check()

    def _take_up_weights(self) -> None:
        """Refuse parameters that no longer lie in their place, and forget what the rounding lost of written ones."""
        self._residence.check()
        if self._residence.notes_writes:
            names, division = self._residence.written(), None if self._meeting is None else self._meeting.division
            if division is None:
                forget_lost(self._residence.layout, self._state, names)
            else:  # a rank keeps what its own matrices lost
                forget_lost(division.owned, self._state, division.owned_names(names))

    def _check_mode(self, model: nn.Module) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a training step was asked for inside torch.inference_mode(); call it outside.")
        if self._meeting is None and (sentence := several_ranks()):  # a group that was made after the step
            raise RuntimeError(sentence)
        if model.training != self._training:
            now, then = ("train", "eval") if model.training else ("eval", "train")
            raise RuntimeError(
                f"the model is in {now} mode, but the step was compiled in {then} mode; call model.{then}() before "
                f"the step."
            )

    @contextlib.contextmanager
    def _together(self, act: str) -> Iterator[None]:
        """With ranks: inside, this one does `act` as the others do, and what it refuses, all refuse."""
        if self._meeting is None:
            yield
            return
        with self._residence.plain():
            writes = 0 if self._released else self._residence.versions() - self._versions_seen
            facts = {"steps": self.steps_called, "numbers": self.hyperparameters.now()}
            with self._meeting.about_to(act, facts, writes, self._contents):
                if self._shows_whole:
                    raise RuntimeError(
                        f"the step {act} inside of `with step.gathered():`, where the model alone is looked at or "
                        f"written; leave it first."
                    )
                yield

    def _contents(self) -> dict[str, int]:
        """A number for the bits of each parameter that lies here, and of what was written in `gathered`."""
        views = self._residence.layout.views(self._residence.banks)
        return contents({n: v for n, v in views.items() if not v.is_meta}) | self._written_whole

    def _check_alive(self) -> None:
        if self._released:
            raise RuntimeError(
                "this training step was released and has no state any more; read metrics and save before release(), "
                "and call compile_training_step() again to train on."
            )

    def __reduce__(self) -> str:
        raise TypeError(
            "a training step is a compiled program over the memory of one model, and cannot be copied or pickled. Save "
            "its state (step.save, step.state_dict), or copy the model: copy.deepcopy(step.model)."
        )
