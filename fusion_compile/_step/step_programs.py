"""The programs of a training step, one for each kind of batch, and what the first run of the loss adds to the state."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._program.program import Program
from fusion_compile._program.programs import Programs
from fusion_compile._ranks.meeting import Meeting
from fusion_compile._state import keys
from fusion_compile._state.residence import Residence
from fusion_compile._step import batches
from fusion_compile._step.batch_numbers import BatchNumbers
from fusion_compile._step.before_sending import BeforeSending, expected_collectives, quiet, refuse_across_ranks
from fusion_compile._step.captures import Captures, Key
from fusion_compile._step.carried import Carried
from fusion_compile._step.carried_entries import CarriedEntries
from fusion_compile._step.gradient_hooks import GradientHooks
from fusion_compile._step.kept_state import KeptNow
from fusion_compile._step.learnable import note_trained
from fusion_compile._step.loss import LossFacts, LossFn, LossModule, examine, unread_sentence
from fusion_compile._step.metrics import drop_metrics, keep_metrics
from fusion_compile._step.micro_batches import Shares, micro_batches, uncut
from fusion_compile._step.notices import Notices
from fusion_compile._step.proof import Proof, not_the_loops, not_the_loops_uncaptured
from fusion_compile._step.pure_step import Form, StepPlan, pure_step
from fusion_compile._step.read_step import Pure, ReadStep
from fusion_compile._step.rehearsed import Outcome, RehearsedStep, outcome_now, rehearse_step
from fusion_compile._step.run_step import RunStep, Step, UncapturedStep
from fusion_compile._step.shapes import MAX_PROGRAMS, Bands, constant_sentence, refuse_too_many
from fusion_compile._step.turn import compiling
from fusion_compile._step.unread import REMEDY, refuse_left_alone
from fusion_compile._step.way import Asked, Grown, Way, choose, tagged
from fusion_compile._step.written import refuse_other_points, refuse_rebound
from fusion_compile._types import Tensors


class StepPrograms(Captures):
    """Compile and run the step for each kind of batch. `facts`: what the loss does; None before its first run.

    `state`: flat; entries for metrics, changed buffers and what user code keeps join it when the loss is first seen.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        plan: StepPlan,
        residence: Residence,
        state: Tensors,
        *,
        mode: str,
        meeting: Meeting | None = None,
    ) -> None:
        self._model, self._loss_fn, self._plan, self._mode = model, loss_fn, plan, mode
        self._roots, self.written_in = {"model": model, "loss_fn": loss_fn}, [loss_fn, *model.modules()]
        self._residence, self._state, self._meeting = residence, state, meeting
        self._leaves_unread = plan.update.transform.extras.leaves_unread
        refuse_left_alone(plan.update.transform, plan.options, several_ranks=meeting is not None)
        self._before = None if meeting is None or plan.division is None else BeforeSending(plan, state, meeting)
        self._programs = Programs(plan.options.backend, plan.options.activation_memory)
        self._regions = plan.options.shared_regions(mode)
        self._steps: dict[Key, list[Step]] = {}
        self._hooks = GradientHooks(dict(model.named_parameters()))
        self._second: dict[int, RehearsedStep] = {}
        """What real runs showed, by the identity of steps whose second call is to be compared, too."""
        self._grown, self.notices = Grown(), Notices()
        self._waited: set[tuple[batches.Signature, bool]] = set()
        self._carried = Carried(model)
        self._entries = CarriedEntries(self._carried, state)
        self.kept = KeptNow(self._roots, self._carried)
        self._signatures: dict[batches.Signature, None] = {}
        self._bands, self._given = Bands(dynamic=plan.options.dynamic), BatchNumbers()
        self.facts: LossFacts | None = None
        note_trained(p for p in model.parameters() if p.requires_grad)
        self.shown: frozenset[str] | None = None
        """The loss's metrics that the last step has; None for all that the state has."""

    @property
    def captured(self) -> list[Program]:
        """The captured programs in the order of compilation."""
        return list(self._programs.captured.values())

    def forget(self) -> None:
        """Drop all compiled functions, which hold the state."""
        self._drop()
        self._signatures.clear()

    def _drop(self) -> None:
        self._programs.forget()
        self._bands.forget()
        self._steps.clear()
        self._second.clear()

    def recapture(self) -> None:
        """Capture again at the next call. What the loss was seen to do is looked at again; all state stays."""
        self.forget()
        drop_metrics(self._state)
        self.facts = None

    def run(self, signature: batches.Signature, batch: tuple[Any, ...], due: bool) -> None:
        """Take one step on `batch`, which has this signature. Compile first where no program fits it."""
        self._hooks.check(read=len(self._programs) > 0)
        self._entries.take_over()
        self._given.hold(batch)
        own = (signature, due, self._carried.signature())
        key = own if own in self._steps else (self._bands.key_of(signature), *own[1:])
        with torch.enable_grad(), self._plan.precision.kept():
            step = next((step for step in self._steps.get(key, ()) if step.fits(self._state, batch)), None)
            try:
                if step is None:
                    step = self._compile(own, batch)
                elif id(step) in self._second:
                    self._take_second(key, step, batch, own)
                else:
                    self._take(step, step(self._state, batch))
            except RuntimeError:
                met = self._meeting is not None and self._meeting.met
                if step is None or met or not self._bands.gives_up(signature):
                    raise
                step = self._compile(own, batch)
            self._bands.serve(signature)
        self.shown = None if self._mode == "eager" else step.shows
        if self.facts is not None:
            self._residence.hand_out(self.facts.assigned, unread=self.facts.unused)

    def _take_second(self, key: Key, step: Step, batch: tuple[Any, ...], own: Key) -> None:
        """Take a program's second step, compared as the first was: what a first step alone has shows now. `own`: the
        batch's key, where `key` is a band's."""
        seen = self._second[id(step)]
        wanted, more = self._looked_again(step, own, batch)
        if more:
            self._steps[key].remove(step)
            self._second.pop(id(step))
            self._compile(own, batch)
            return
        if wanted is None:
            self._take(step, step(self._state, batch))
        else:
            proof = Proof(wanted, self._state, seen.rehearsal.dtypes)
            found = self._compared(proof, step, batch, seen)
            if found.objection:
                self._steps[key].remove(step)
                self._second.pop(id(step))
                objection = f"in its second step {found.objection}"
                given_up = self._bands.gives_up(own[0])
                if (isinstance(step, RunStep) and not given_up) or self._plan.options.capture == "read":
                    raise ValueError(not_the_loops(objection))
                self._compile(own, batch, "" if isinstance(step, RunStep) else f"when it is read, {objection}")
                return
            self._take(step, found.fresh)
        self._second.pop(id(step))
        if isinstance(step, ReadStep):
            step.forget_graph()

    def _looked_again(self, step: Step, own: Key, batch: tuple[Any, ...]) -> tuple[Outcome | None, bool]:
        """What the ordinary loop computes now, if there is memory, and whether it changes more than `step` carries: of
        what moves on from place to place (a queue) a step sees as much as two runs move."""
        if not (isinstance(step, RunStep) and self._carried):
            return outcome_now(self._model, self._loss_fn, self._plan, self._state, batch), False
        try:
            later, way = self._rehearsed(own, batch, fill=False)  # the step's watch knows what stands there
        except torch.OutOfMemoryError:
            return None, False
        known, moved = self._carried.labels() | {slot.label for slot in step.counted}, (*way.carried, *way.numbers)
        return getattr(later, "wanted", None), not {record.label for record in moved} <= known

    # ------------------------------------------------------------------ a new program

    def _compile(self, key: Key, batch: tuple[Any, ...], not_read: str = "") -> Step:
        """Look at the loss, choose a way, compile, and take the first step. `not_read`: why it is not read."""
        compiling()
        signature, due, _ = key
        options, bound = self._plan.options, sys.maxsize  # uncompiled, a shape has no program
        bound = bound if self._mode == "eager" else options.max_shapes
        refuse_too_many(signature, self._signatures, bound, of_this_shape=len(self._steps.get(key, ())))
        parts = micro_batches(batch, options.accumulate)
        if whole := uncut(batch) if options.accumulate > 1 else "":
            self.notices.warn(f"uncut {whole}", whole)
        if self._mode != "eager" and (said := constant_sentence(signature, self._signatures)):
            self.notices.warn(said, said)
        with quiet(self._meeting, self._mode):
            seen, way = self._rehearsed(key, batch)
        follows = bool(self._given.slots) and not options.fixes_numbers
        if not_read or (follows and not way.runs):
            way = way._replace(runs=True, because=not_read or self._given.because())
        self._carried.add(way.carried, self._roots)
        self._carried.own([] if seen is None else seen.rehearsal.owned())
        self._carried.count(record.slot for record in way.numbers if record.slot is not None)
        self._entries.take_all()
        key = (*key[:2], self._carried.signature())  # what it carries is known now
        if self._mode != "eager" and not way.not_yet:
            self._carried.refuse_more_programs(MAX_PROGRAMS, key[:2])
        there = {k: self._state.get(keys.point(k), b) if b.is_meta else b for k, b in self._residence.banks.items()}
        weights = self._plan.whole.views(there)
        given = self._model, self._loss_fn, weights, parts[0].batch, self._plan.precision, self._carried
        with quiet(self._meeting, self._mode):
            found = examine(*given, rehearsed=seen is not None, uncaptured=self._mode == "eager")
        if self._plan.division is not None:
            refuse_across_ranks(self._model, found, self._carried.labels(), self.notices)
        refuse_other_points(self._plan.update, self._state, found.written)
        if self._mode != "eager":
            refuse_rebound(found.rebound)
            way = self._grown.waits(way, found.reshaped)
        facts = self._adopt(found, known_shape=signature in self._signatures)
        if self._meeting is not None:
            self._meeting.expected = expected_collectives(self._plan, self._model, facts)
        numbers_given = self._given if follows else None
        loss = LossModule(self._model, self._loss_fn, facts.changed_buffers, self._plan.precision, numbers_given)
        pure: Pure = partial(pure_step, self._plan, loss, facts, self._carried)
        if self._mode == "eager" or way.not_yet:
            numbers = [record.slot for record in way.numbers if record.slot is not None]
            update = self._plan.update if self._mode == "eager" else None  # other programs know the metrics
            step: Step = UncapturedStep(pure(Form(due, runs=True, before=self._before)), self._carried, numbers, update)
            self._take(step, self._uncaptured(step, batch, seen))
        else:
            step, key = self._captured(key, pure, batch, seen, way)
            if seen is not None:
                self._second[id(step)] = seen
                if seen.rehearsal.checks_arguments:
                    self.notices.checks_nothing()
        step.shows = frozenset(found.metrics)
        self._signatures[signature] = None
        self.kept.counts([*step.counted, *(() if seen is None else seen.once())])
        self.kept.draws_from(() if seen is None else seen.rehearsal.moved_generators)
        if way.not_yet:
            if not (once := seen is not None and bool(seen.rehearsal.once)):
                self._waited.add(key[:2])
            then = "so does each one of which that holds" if once else "the next one is captured without that"
            self.notices.ran_uncaptured(way.not_yet, then)
        else:
            self._steps.setdefault(key, []).append(step)
        return step

    def _uncaptured(self, step: Step, batch: tuple[Any, ...], seen: RehearsedStep | None) -> Tensors:
        """Take an uncaptured step, and compare it unless the loss reads what is another thing each time (a clock)."""
        if seen is None or seen.sources:
            return step(self._state, batch)
        contents = Contents(self._roots)
        if self._before is not None:  # compared before it communicates
            self._before.proof = Proof(seen.wanted, self._state, seen.rehearsal.dtypes)
            try:
                return step(self._state, batch)
            except ValueError:
                contents.restore()
                raise
        found = self._compared(Proof(seen.wanted, self._state, seen.rehearsal.dtypes), step, batch, seen)
        if found.objection:
            contents.restore()
            raise ValueError(not_the_loops_uncaptured(found.objection))
        return found.fresh

    def _rehearsed(self, key: Key, batch: tuple[Any, ...], *, fill: bool = True) -> tuple[RehearsedStep | None, Way]:
        """What real runs of the loss showed, and how to capture it. `fill`: whether caches that they filled stay so."""
        options, uncompiled = self._plan.options, self._mode == "eager"
        if not options.rehearse:
            return None, Way(uncompiled, "", ())
        seen = rehearse_step(self._model, self._loss_fn, self._plan, self._state, batch)
        self.notices.showed(seen, kept=options.keep_gradients, cut=options.accumulate > 1)
        if fill and not uncompiled:  # Python fills them itself, with what it decides beside them
            seen.rehearsal.fill()
            if self._steps and self._grown.refilled(seen.rehearsal):
                self._drop()  # the others have read the old table
        asked = Asked(
            options.capture,
            uncompiled=uncompiled,
            may_wait=key[:2] not in self._waited,
            hooked=self._hooks.names(),
            tagged=tagged(self._model),
            carries=self._carried.labels(),
            kept_outside=seen.kept_outside,
            accumulated=seen.accumulated,
        )
        return seen, choose(seen.rehearsal, asked)

    def _adopt(self, found: LossFacts, *, known_shape: bool) -> LossFacts:
        """The facts for a program. Buffers that a loss did not change before join the state, and programs that do not
        know them are dropped."""
        try:  # where nothing is captured each step shows the metrics that it has
            facts = found.joined(self.facts, any_metrics=self._mode == "eager", any_unread=self._leaves_unread)
        except ValueError as difference:
            when = "the loss now" if known_shape else "with this batch shape the loss"
            raise ValueError(f"{when} {difference}; compile another step for it. {REMEDY}.") from None
        if self.facts is None or self._mode != "eager":
            update, options = self._plan.update, self._plan.options
            parts = 1 if self._plan.division is None else self._plan.division.ranks.world
            shares = Shares((1,) * options.accumulate * parts, options.weigh_by)
            more = {n: what for n, what in facts.metrics.items() if self.facts is None or n not in self.facts.metrics}
            keep_metrics(update, self._state, shares.metrics(more, update.layout.state_dtype))
        if self.facts is None and facts.unused and not self._leaves_unread:
            self.notices.warn("unused", unread_sentence(facts.unused))
        known = () if self.facts is None else self.facts.changed_buffers
        if new := [name for name in facts.changed_buffers if name not in known]:
            for name, buffer in self._residence.keep_buffers(new, facts.assigned).items():
                self._state[keys.buffers(name)] = buffer
                _compat.mark_static(buffer)
            self._drop()
        self.facts = facts
        return facts
