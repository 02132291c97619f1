"""What a training step saves and loads: its whole state, keyed by full parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fusion_compile._program.saved import folder
from fusion_compile._program.saved.folder import refuse_uncompiled
from fusion_compile._state import checkpoint, checkpoint_folder, machine
from fusion_compile._state.banks import Layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.warm_start import WarmStart, begin_from
from fusion_compile._step.background import Background
from fusion_compile._step.parts_saved import PartsSaved
from fusion_compile._step.periodic import FirstTaken
from fusion_compile._step.saved_by_ranks import (
    assembled,
    begin_parts,
    put_parts,
    random_states,
    room_for_whole,
    stacks_of,
    with_own_random_state,
    written_here,
)
from fusion_compile._step.step_programs import StepPrograms
from fusion_compile._step.together import contents
from fusion_compile._step.turn import in_turn
from fusion_compile._step.whole_weights import WholeWeights


class Saves(WholeWeights):
    """The part of a step that saves and loads."""

    layout: Layout
    hyperparameters: Hyperparameters
    mode: str
    backend: str
    steps_called: int
    _programs: StepPrograms
    _is_first: FirstTaken
    _background: Background

    @in_turn
    def state_dict(self) -> dict[str, Any]:
        """Copy all state, keyed by full parameter name.

        Returns:
            ``model``, ``optimizer`` (``<part>.<parameter>``; of a named group ``<group>.<part>.<parameter>``),
            ``counts``, ``buffers``, ``carried`` (tensors that the loss keeps in Python), ``numbers`` (plain ones that
            it counts), ``hyperparameters``, ``steps_called`` and ``rng``. With ``mesh=`` all ranks call this together,
            and each gets the whole.
        """
        with self._together("gives its state"):
            return self._everything(again=False)

    def _everything(self, *, again: bool) -> dict[str, Any]:
        """What `state_dict` gives. `again`: with ranks, whether they meet once more afterwards."""
        self._check_whole()
        self._take_written()
        meeting, state = self._meeting, self._state
        if meeting is not None and meeting.division is not None:
            weights = self._contents()
            meeting.meet("gathers its state", again=again, weights=weights)
            state = assembled(meeting.division, state)
        with self._whole():
            saved = checkpoint.state_dict(self.model, self.layout, state, self.hyperparameters, self.steps_called)
        if meeting is not None:
            saved["rng"] = random_states(meeting, saved["rng"])
        return {**saved, **self._programs.kept.now()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave into the existing memory.

        Args:
            saved: What `state_dict` gave for a step of the same model and recipe.

        Raises:
            ValueError: Names or shapes differ. The sentence lists them, and nothing is loaded.
        """
        with self._together("loads a state"):
            self._load_state_dict(saved)

    def _load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._check_whole(torn=True)
        checkpoint.refuse_other_kinds(saved)
        kept = self._programs.kept.given(saved)
        meeting, division = self._meeting, self._plan.division
        state, numbers, agreed = self._state, self.hyperparameters, None
        if meeting is not None and division is not None:
            saved, state = with_own_random_state(meeting, saved), room_for_whole(division, state)
            weights = contents({n: t for n, t in saved.get("model", {}).items() if isinstance(t, Tensor)})
            called = saved.get("steps_called")
            agreed = partial(meeting.meet, "loads a state", weights=weights, steps=called)
        with self._turn.writing(everything=True), torch.no_grad(), self._room_for_whole():
            called = checkpoint.load_state_dict(saved, self.model, self.layout, state, numbers, agreed)
            self.steps_called = called
            if division is not None:
                put_parts(division, self._state, state)
            self._is_first = FirstTaken(self._plan.update)
            self._programs.kept.put(kept)
        self._residence.say_written()
        self._versions_seen = self._residence.versions()

    @overload
    def save(self, path: str | PathLike[str], *, asynchronous: Literal[False] = False) -> None: ...
    @overload
    def save(self, path: str | PathLike[str], *, asynchronous: Literal[True]) -> Future[None]: ...

    def save(self, path: str | PathLike[str], *, asynchronous: bool = False) -> Future[None] | None:
        """Write a checkpoint folder: files of tensors, and a JSON index that is renamed into place last.

        Without ``mesh=`` the files are safetensors. With it all ranks call this together and each writes what it owns,
        with ``torch.distributed.checkpoint``; all of them see the folder. Any number of ranks loads it, and one process
        does.

        Args:
            path: The folder; it is made where it is missing.
            asynchronous: Copy the state and return, and write it in the background while training goes on. What is
                saved is the state at the call. The next save waits for it, and Python ends after it; call the result
                before ``destroy_process_group()``.

        Returns:
            With `asynchronous` a future: ``.result()`` waits until the checkpoint is written.

        Raises:
            OSError: It could not be written; the older checkpoint is whole.

        Example:
            >>> saving = step.save("checkpoint", asynchronous=True)  # doctest: +SKIP
            >>> loss = step(x, y)  # doctest: +SKIP
            >>> saving.result()  # doctest: +SKIP
        """
        computed_on = machine.computing_on(self.layout.device)
        if self._meeting is not None and self._meeting.division is not None:
            return self._save_by_ranks(path, {"computed_on": computed_on}, asynchronous)
        self._background.wait()
        write = partial(checkpoint_folder.save, path, {**self.state_dict(), "computed_on": computed_on})
        if asynchronous:
            return self._background.begin(write)
        write()
        return None

    def _save_by_ranks(
        self, path: str | PathLike[str], facts: dict[str, Any], asynchronous: bool
    ) -> Future[None] | None:
        meeting, kept = self._meeting, self._programs.kept
        assert meeting is not None and meeting.division is not None
        with self._together("saves"), self._turn:
            self._check_whole()
            self._take_written()
            self._background.wait()
            first = meeting.ranks.rank == 0
            folder = checkpoint_folder.made(path) if first else Path(path).expanduser()
            weights = self._contents()
            meeting.meet("saves", again=not asynchronous, weights=weights)
            tag = meeting.channel.everyone_says(checkpoint_folder.new_tag(self.steps_called))[0]
            divides = self._divides_weights()
            state = self._state if divides is None else assembled(divides, self._state)
            with self._whole():
                sections = checkpoint.sections_of(self.model, self.layout, state)
                now = kept.now()
                parts = written_here(meeting.division, {**sections, "carried": now["carried"]}, state)
            facts |= {"steps_called": self.steps_called, "hyperparameters": self.hyperparameters.state_dict()}
            facts |= {"numbers": now["numbers"], "stacks": stacks_of(meeting.division)}
            group = meeting.channel.group(beside=asynchronous)
            saved = PartsSaved(folder, tag, parts, facts if first else None, group)
            if asynchronous:
                return self._background.begin(saved.write)
            saved.write()
            meeting.meet("has saved")
            return None

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
        with self._together("loads a state"):
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
        with self._together("starts from a state"):
            self._check_whole()
            saved = checkpoint.of(source, self.layout.device)
            meeting, division = self._meeting, self._plan.division
            if meeting is not None:
                checkpoint.refuse_another_model(saved, self.model)
                meeting.meet("starts from a state", weights=contents(dict(saved["model"])))
            with self._room_for_whole():
                checkpoint.load_model(saved, self.model)
                if division is None:
                    self._plan.update.begin_at(self._residence.banks, self._state)
                    started = begin_from(saved["optimizer"], self.layout, self._state)
                else:
                    begin_parts(division, self._plan.update, self._residence.banks, self._state)
                    whole = assembled(division, self._state)
                    started = begin_from(saved["optimizer"], self.layout, whole)
                    put_parts(division, self._state, whole)
            self._residence.say_written()
            self._versions_seen = self._residence.versions()
            return started
