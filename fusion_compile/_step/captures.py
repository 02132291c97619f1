"""Capturing a step: read or run, compiled, proved to be the ordinary loop's, and taken for the first time."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from fusion_compile._capture.by_running.symbolic_sizes import SizeFixed
from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._capture.rehearsal.left_behind import Kind
from fusion_compile._program.beside_its_graph import Beside
from fusion_compile._program.memory.activations import activations_kept
from fusion_compile._program.programs import Programs
from fusion_compile._program.shared_regions import SharedRegions
from fusion_compile._progress import stage
from fusion_compile._ranks.meeting import AtEachRun, Meeting
from fusion_compile._state.residence import Residence
from fusion_compile._step import batches
from fusion_compile._step.batch_numbers import BatchNumbers
from fusion_compile._step.before_sending import proved_alone
from fusion_compile._step.by_running import CapturedStep, captured_step
from fusion_compile._step.carried import Carried
from fusion_compile._step.carried_entries import CarriedEntries
from fusion_compile._step.counted import CountedNumbers, count_numbers, fixed_numbers, operand_sentence
from fusion_compile._step.loss import LossFn, LossModule, run_on_fakes
from fusion_compile._step.micro_batches import micro_batches
from fusion_compile._step.notices import Notices
from fusion_compile._step.operands import NotAnOperand
from fusion_compile._step.proof import Compared, Proof, not_the_loops, take_compared
from fusion_compile._step.pure_step import Form, StepPlan
from fusion_compile._step.read_step import NotRead, Pure, ReadStep, graph_proved, watch_around
from fusion_compile._step.rehearsed import RehearsedStep
from fusion_compile._step.run_step import RunStep, Step
from fusion_compile._step.shapes import Band, Bands, Dims, no_band_sentence
from fusion_compile._step.way import Way, refuse_aliases, refuse_sources, refuse_unread
from fusion_compile._types import Tensors

Key: TypeAlias = tuple[batches.Signature, bool, Hashable]
"""The batch's signature, whether the transform's period is due, and what the state that user code keeps looks like."""


class Captures:
    """The part of `StepPrograms` that captures. What it needs of the other part:

    Attributes:
        notices: What is said once.
    """

    notices: Notices
    _model: nn.Module
    _loss_fn: LossFn
    _plan: StepPlan
    _mode: str
    _roots: dict[str, Any]
    _residence: Residence
    _state: Tensors
    _meeting: Meeting | None
    _programs: Programs
    _regions: SharedRegions | None
    _steps: dict[Key, list[Step]]
    _carried: Carried
    _entries: CarriedEntries
    _signatures: dict[batches.Signature, None]
    _bands: Bands
    _given: BatchNumbers

    def _drop(self) -> None:
        """Drop all programs."""
        raise NotImplementedError

    def _take(self, step: Step, fresh: Tensors) -> None:
        """The step was taken, and counts. `fresh`: entries that the state did not have."""
        step.done()
        if fresh and self._entries.exchange(self._residence, fresh) and self._mode != "eager":
            self._drop()
        self._entries.give_back(step.forms, fresh)

    def _compared(self, proof: Proof, step: Step, batch: tuple[Any, ...], seen: RehearsedStep) -> Compared:
        """Take one step; what the compiler's rounding alone makes different is said once."""
        graph = step if isinstance(step, (RunStep, ReadStep)) and step.has_graph else None
        found = take_compared(
            self._state,
            proof,
            lambda: step(self._state, batch),
            None if graph is None else partial(graph.uncompiled, self._state, batch),
            draws_apart=self._draws_apart(seen) and step.compiler_draws,
            alone=None if self._meeting is None else self._meeting.alone,
        )
        if found.rounding:
            self.notices.rounds_otherwise(found.rounding)
        if found.objection and isinstance(step, RunStep) and step.program.compiled:
            self.notices.not_by_region(found.objection)
            step.compile(self._state, batch, self._mode, self._plan.options.backend, None)
            return self._compared(proof, step, batch, seen)
        return found

    def _captured(
        self, key: Key, pure: Pure, batch: tuple[Any, ...], seen: RehearsedStep | None, way: Way
    ) -> tuple[Step, Key]:
        """Capture the step, compile it, take the first step, and prove that it is the ordinary loop's. The step, and
        the key of the batches that it is for."""
        options, because = self._plan.options, way.because
        if not way.runs:
            proof, ranks = (
                None if seen is None else Proof(seen.wanted, self._state, seen.rehearsal.dtypes),
                self._meeting,
            )
            apart = seen is not None and self._draws_apart(seen)
            try:
                band, read = self._read(key, pure, batch, proof, apart=apart)
                objection = (
                    "" if proof is None or apart or ranks is not None else proof.objection_when_read(self._state)
                )
                if not objection:
                    watch_around(read, self._roots, self._model, None if seen is None else seen.reads)
                    if band is not None:
                        self._bands.open(band, key[0])
                    return read, key if band is None else (band.signature, *key[1:])
                assert proof is not None
                read.forget()
                proof.undo(self._state)
                because = f"when it is read, {objection}"
            except NotRead as error:
                because = str(error)
            refuse_unread(because, options.capture, None if seen is None else seen.rehearsal)
        assert seen is not None
        refuse_sources(seen.sources, because)
        refuse_aliases(seen.rehearsal, because)
        changing = [record.slot for record in way.numbers if record.slot is not None]
        self.notices.runs(because, seen.changes_batch)
        band, step = self._run_for_a_band(key, pure, batch, changing, seen)
        step.watch(self._roots, seen.reads, self._carried)
        if band is None:
            return step, key
        self._bands.open(band, key[0])
        return step, (band.signature, *key[1:])

    def _run_for_a_band(
        self, key: Key, pure: Pure, batch: tuple[Any, ...], changing: list[Slot], seen: RehearsedStep
    ) -> tuple[Band | None, RunStep]:
        """Run the step for `batch`, or for a band of sizes, which is then given, too."""
        band, options = self._bands.opened_by(key[0], self._signatures), self._plan.options
        if band is not None and (why := self._no_band(changing, seen)):
            self.notices.warn("fixed", no_band_sentence(why, options.max_shapes))
        elif band is not None:
            try:
                return band, self._run(key, pure, batch, changing, seen, band)
            except NotAnOperand:
                raise
            except ValueError as error:
                said = str(error) if isinstance(error, SizeFixed) else f"with symbols for sizes, {error}"
                self.notices.warn("band", f"no one program serves these sizes, so each has its own: {said}")
        return None, self._run(key, pure, batch, changing, seen)

    def _no_band(self, changing: list[Slot], seen: RehearsedStep) -> str:
        """Why a step that is captured by running has a program for each shape; empty where one may serve several.

        What Python keeps besides tensors may be a size, which a program would give back as it was at its capture.
        """
        filled = any(record.kind is Kind.CACHE for record in seen.rehearsal.left)
        if changing or filled or not self._carried.holds_tensors_alone():
            return "the loss changes what Python keeps besides tensors"
        if self._given.slots:
            return "a batch has plain numbers"
        if self._plan.options.accumulate > 1:
            return "accumulate cuts the batch by its size"
        if self._regions is not None:
            return "regions are compared size by size"
        return "several ranks must do the same" if self._meeting is not None else ""

    def _read(
        self, key: Key, pure: Pure, batch: tuple[Any, ...], proof: Proof | None, *, apart: bool
    ) -> tuple[Band | None, ReadStep]:
        """Read the step for `batch`, or for a band of sizes, which is then given, too. `apart`: whether `proof` is what
        the captured graph must show before the compiled step runs."""
        first = Beside(partial(graph_proved, proof, self._state)) if proof is not None and apart else None
        if self._meeting is not None:
            proved = partial(proved_alone, proof, self._state, self._meeting, apart)
            first = Beside(proved, AtEachRun(self._meeting))
        band = self._bands.opened_by(key[0], self._signatures)
        given, due, mode = (self._state, batch), key[1], self._mode
        if band is not None:
            try:
                return band, ReadStep(
                    self._programs, (band.signature, *key[1:]), pure, due, given, mode, band.dims, first
                )
            except NotRead as error:
                self.notices.warn("band", f"no one program serves these sizes, so each has its own: {error}")
        return None, ReadStep(self._programs, key, pure, due, given, mode, (), first)

    def _draws_apart(self, seen: RehearsedStep) -> bool:
        """Whether the compiled step draws other random numbers than the ordinary loop."""
        return seen.rehearsal.drew_random and self._plan.options.backend == "inductor"

    def _run(
        self,
        key: Key,
        pure: Pure,
        batch: tuple[Any, ...],
        changing: list[Slot],
        seen: RehearsedStep,
        band: Band | None = None,
    ) -> RunStep:
        numbers, options = self._numbers(changing, batch), self._plan.options
        with stage(f"compiling the training step ({options.compiler(self._mode)})"):
            try:
                captured = self._capture(key, pure, batch, numbers, () if band is None else band.dims)
            except NotAnOperand as error:
                if changing or not self._given.slots:
                    raise ValueError(operand_sentence(numbers, str(error))) from error
                numbers = fixed_numbers(self._given.slots)  # an operator wants the plain number
                captured = self._capture(key, pure, batch, numbers)
            if band is not None and not self._carried.holds_tensors_alone():
                raise SizeFixed("the loss keeps something in Python that may be a size.")
            more = captured.gather_late() if self._meeting is not None else 0
            step = RunStep(captured, self._carried.without_numbers(self._carried.forms), numbers)
            with activations_kept(options.activation_memory):
                step.compile(self._state, batch, self._mode, options.backend, self._regions)
            step.meets = None if self._meeting is None else AtEachRun(self._meeting).of(captured.graph, more)
            found = self._compared(Proof(seen.wanted, self._state, seen.rehearsal.dtypes), step, batch, seen)
        if found.objection:
            raise ValueError(not_the_loops(found.objection))
        self._programs.captured[key, len(self._steps.get(key, ()))] = step.program
        self._take(step, found.fresh)
        return step

    def _capture(
        self, key: Key, pure: Pure, batch: tuple[Any, ...], numbers: CountedNumbers, dims: Dims = ()
    ) -> CapturedStep:
        step = numbers.followed(pure(Form(due=key[1], runs=True)))
        return captured_step(self._roots, step, self._state, numbers.given(batch), self._model, dims)

    def _numbers(self, slots: list[Slot], batch: tuple[Any, ...]) -> CountedNumbers:
        contents, given = Contents(self._roots), self._given
        loss = LossModule(self._model, self._loss_fn, (), self._plan.precision, given)

        def run(mode: Any) -> None:
            for part in micro_batches(batch, self._plan.options.accumulate):
                run_on_fakes(mode, loss, part.batch, self._carried)

        try:
            device, every = self._plan.update.layout.device, [*slots, *given.slots]
            return count_numbers(slots, run, lambda: contents.restore(keep=every), device, given.slots)
        finally:
            contents.restore()
