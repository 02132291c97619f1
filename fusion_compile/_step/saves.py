"""What a training step saves and loads: its whole state, keyed by full parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from fusion_compile._program.saved import folder
from fusion_compile._program.saved.folder import refuse_uncompiled
from fusion_compile._state import checkpoint, checkpoint_folder, machine
from fusion_compile._state.banks import Layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.warm_start import WarmStart, begin_from
from fusion_compile._step.lifetime import Lifetime
from fusion_compile._step.periodic import FirstTaken
from fusion_compile._step.pure_step import StepPlan
from fusion_compile._step.step_programs import StepPrograms
from fusion_compile._step.turn import in_turn


class Saves(Lifetime):
    """The part of a step that saves and loads."""

    model: nn.Module
    layout: Layout
    hyperparameters: Hyperparameters
    mode: str
    backend: str
    steps_called: int
    _plan: StepPlan
    _programs: StepPrograms
    _is_first: FirstTaken

    @in_turn
    def state_dict(self) -> dict[str, Any]:
        """Copy all state, keyed by full parameter name.

        Returns:
            ``model``, ``optimizer`` (``<part>.<parameter>``; of a named group ``<group>.<part>.<parameter>``),
            ``counts``, ``buffers``, ``carried`` (tensors that the loss keeps in Python), ``numbers`` (plain ones that
            it counts), ``hyperparameters``, ``steps_called`` and ``rng``.
        """
        self._check_whole()
        saved = checkpoint.state_dict(self.model, self.layout, self._state, self.hyperparameters, self.steps_called)
        return {**saved, **self._programs.kept.now()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave into the existing memory.

        Args:
            saved: What `state_dict` gave for a step of the same model and recipe.

        Raises:
            ValueError: Names or shapes differ. The sentence lists them, and nothing is loaded.
        """
        self._check_whole(torn=True)
        checkpoint.refuse_other_kinds(saved)
        kept = self._programs.kept.given(saved)
        state, numbers = self._state, self.hyperparameters
        with self._turn.writing(everything=True), torch.no_grad():
            self.steps_called = checkpoint.load_state_dict(saved, self.model, self.layout, state, numbers)
            self._is_first = FirstTaken(self._plan.update)
            self._programs.kept.put(kept)
        self._residence.say_written()

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint folder: safetensors files, and a JSON index that is renamed into place last.

        Args:
            path: The folder; it is made where it is missing.
        """
        computed_on = machine.computing_on(self.layout.device)
        checkpoint_folder.save(path, {**self.state_dict(), "computed_on": computed_on})

    def load(self, path: str | PathLike[str], *, verify: bool = True) -> None:
        """Load a folder that `save` wrote, with the random state, so that a resumed run is bitwise the same.

        It is on the same machine with the same number of threads; a warning says where those differ.

        Args:
            path: The folder.
            verify: Compare every tensor with its checksum. Checkpoints of version 0.1 have none.

        Raises:
            FileNotFoundError: `path` holds no checkpoint.
            ValueError: It is damaged, or of another model or optimizer; nothing is loaded.
        """
        self._check_alive()
        saved = checkpoint_folder.load(path, self.layout.device, verify=verify)
        machine.warn_of_another(saved.pop("computed_on"), self.layout.device)
        self.load_state_dict(saved)

    @in_turn
    def save_program(self, path: str | PathLike[str]) -> None:
        """Write what was compiled, so that another process takes its first step sooner.

        ``compile_training_step(…, program=path)`` reads it, with the same torch and Python, on the same kind of machine
        and with as many threads; else it says so and compiles. The loss is still looked at and captured. The file is
        written beside an older one and renamed. It holds code: read only what you trust as you trust code.

        Args:
            path: The folder; it is made where it is missing. A checkpoint's will do.

        Raises:
            ValueError: Nothing is compiled yet, or Inductor compiles nothing, or torch's caches are off.
        """
        self._check_alive()
        refuse_uncompiled(self.mode, self.backend)
        if not self._programs.captured:
            raise ValueError("the step has no program to save before its first call; take a step, then save.")
        folder.save_program(path, self.layout.device, self._programs.written_in, "the step's program")

    @in_turn
    def warm_start(self, source: str | PathLike[str] | Mapping[str, Any]) -> WarmStart:
        """Start from a checkpoint of the same model under *another* recipe or with other groups.

        Weights are loaded, and the optimizer state that both recipes have. Counts, numbers and random state stay.

        Args:
            source: A folder that `save` wrote, or what `state_dict` gave.

        Returns:
            What was carried over, starts fresh, and found no use; printing it sums it up.

        Raises:
            ValueError: The checkpoint is of another model; nothing is loaded.
        """
        self._check_whole()
        saved = checkpoint.of(source, self.layout.device)
        checkpoint.load_model(saved, self.model)
        self._plan.update.begin_at(self._residence.banks, self._state)
        self._residence.say_written()
        return begin_from(saved["optimizer"], self.layout, self._state)
