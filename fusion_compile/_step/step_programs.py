"""The programs of a training step, one for each kind of batch, and what the first run of the loss adds to the state."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal
from fusion_compile._program.program import Program, refuse_host_syncs
from fusion_compile._program.programs import GraphRefused, Programs
from fusion_compile._say_once import SayOnce
from fusion_compile._state import keys
from fusion_compile._state.residence import Residence
from fusion_compile._step import batches
from fusion_compile._step.by_running import CapturedStep
from fusion_compile._step.carried import Carried
from fusion_compile._step.host_reads import not_captured_message
from fusion_compile._step.loss import LossFacts, LossFn, LossModule, examine
from fusion_compile._step.metrics import step_metrics
from fusion_compile._step.proof import Proof
from fusion_compile._step.pure_step import Form, StepPlan, pure_step
from fusion_compile._step.rehearsed import rehearse_step
from fusion_compile._step.update import donated
from fusion_compile._step.way import choose
from fusion_compile._types import Tensors

MAX_PROGRAMS = 8
"""Different batch shapes that one step compiles before it refuses another."""


class NotRead(ValueError):
    """Dynamo could not read the step; the sentence says where. Nothing was compiled or run."""


Key: TypeAlias = tuple[batches.Signature, bool, Hashable]
"""The batch's signature, whether the transform's period is due, and what the state that user code keeps looks like."""


class StepPrograms:
    """Compile and run the step for each kind of batch. `facts`: what the loss does; None before its first run.

    `state` is the step's flat state; entries for metrics and changed buffers join it when the loss is first seen.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, plan: StepPlan, residence: Residence, state: Tensors, *, mode: str
    ) -> None:
        self._model, self._loss_fn, self._plan, self._mode = model, loss_fn, plan, mode
        self._residence, self._state = residence, state
        self._programs = Programs(plan.options.backend)
        self._warn = SayOnce()
        self._carried = Carried()
        self._forms: dict[Hashable, dict[str, Any]] = {}
        self.facts: LossFacts | None = None
        self._signatures: dict[batches.Signature, None] = {}

    @property
    def captured(self) -> list[Program]:
        """The captured programs in the order of compilation."""
        return list(self._programs.captured.values())

    def forget(self) -> None:
        """Drop all compiled functions, which hold the state."""
        self._programs.forget()
        self._signatures.clear()

    def run(self, signature: batches.Signature, batch: tuple[Any, ...], due: bool) -> None:
        """Take one step on `batch`, which has this signature. Compile first where no program fits it."""
        self._take_over()
        key = (signature, due, self._carried.signature())
        with torch.enable_grad():
            known = self._programs.get(key)
            if known is None:
                self._compile(key, batch)
                self._signatures[signature] = None
            else:
                self._give_back(self._forms[key], known(self._state, batch))

    def _take_over(self) -> None:
        """What user code did since the last step to the state that it keeps counts from this step on."""
        self._carried.check()
        for path, tensor in self._carried.changed_by_the_user().items():
            self._store(keys.carried(path), tensor)

    def _give_back(self, forms: dict[str, Any], fresh: Tensors) -> None:
        """Put what a step computed where user code keeps it. `fresh`: entries that the state did not have."""
        if not self._carried:
            return
        for key, tensor in fresh.items():
            self._store(key, tensor)
        self._carried.put(forms, keys.section(self._state, keys.CARRIED))

    def _store(self, key: str, tensor: Tensor) -> None:
        old = self._state.get(key)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            if old is not tensor:
                with torch.no_grad():
                    old.copy_(tensor)
        else:
            self._state[key] = tensor if keys.split(key)[1] in self._carried.written else tensor.detach().clone()
            _compat.mark_static(self._state[key])

    def _compile(self, key: Key, batch: tuple[Any, ...]) -> None:
        signature, due, _ = key
        batches.check_same_kind(signature, self._signatures)
        if len({*self._signatures, signature}) > MAX_PROGRAMS:
            raise ValueError(
                f"this would be batch shape number {MAX_PROGRAMS + 1}: each shape is a program of its own. Pad or "
                f"bucket the batches, or drop the last incomplete one (DataLoader(drop_last=True))."
            )
        options = self._plan.options
        if options.accumulate > 1:
            batches.check_divisible(batch, options.accumulate)
        rehearsal = rehearse_step(self._model, self._loss_fn, self._plan, self._state, batch)
        rehearsal.fill()
        way = choose(rehearsal, options.capture, uncompiled=self._mode == "eager")
        self._carried.add(way.carried, {"model": self._model, "loss_fn": self._loss_fn})
        for path, tensor in self._carried.tensors().items():
            self._store(keys.carried(path), tensor)
        weights = self._plan.update.layout.views(self._residence.banks)
        example = batches.micro_batch(batch, 0, options.accumulate) if options.accumulate > 1 else batch
        facts = examine(self._model, self._loss_fn, weights, example, options.compute_dtype, self._carried)
        if self.facts is None:
            self._adopt(facts)
        elif facts != self.facts:
            raise ValueError(
                f"with this batch shape the loss {facts.difference(self.facts)}; compile another step for it."
            )
        loss = LossModule(self._model, self._loss_fn, facts.changed_buffers, options.compute_dtype)

        def pure(form: Form) -> Any:
            return pure_step(self._plan, loss, facts, self._carried, form)

        proof = self._proof(rehearsal)
        if not way.runs:
            objection = self._read(key, pure, batch, due, proof)
            if objection is None:
                return
            way = way._replace(runs=True, because=objection)
            if options.capture == "read":
                raise ValueError(f"the step cannot be captured by reading: {objection}.")
        if way.because:
            self._warn("runs", f"the step is captured by running it, because {way.because}.")
        self._run(key, pure(Form(due=due, runs=True)), batch, proof)

    def _proof(self, rehearsal: Rehearsal) -> Proof | None:
        """What the first step is compared with; None where the compiled step draws other random numbers."""
        options = self._plan.options
        if self._mode == "eager" or (rehearsal.drew_random and options.backend == "inductor"):
            return None
        dtypes = {b.dtype for b in self._plan.update.layout.banks} | {options.compute_dtype or torch.float32}
        return Proof(rehearsal.results[0], self._state, dtypes)

    def _read(self, key: Key, pure: Any, batch: tuple[Any, ...], due: bool, proof: Proof | None) -> str | None:
        """Capture by reading, compile, and take the first step. None, or why reading will not do; nothing has happened
        then."""
        try:
            try:
                self._read_first(key, pure(Form(due=due)), batch)
            except GraphRefused as refusal:
                if not _recomputes_between_backwards(refusal.program):
                    raise
                self._read_first(key, pure(Form(due=due, one_backward=True)), batch)
        except NotRead as error:
            if self._plan.options.capture == "read":
                raise ValueError(str(error)) from error
            return str(error)
        objection = "" if proof is None else proof.objection(self._state)
        if proof is not None and objection:
            self._programs.drop(key)
            proof.undo(self._state)
            return f"read, {objection}"
        return None

    def _read_first(self, key: Key, advance: Any, batch: tuple[Any, ...]) -> None:
        try:
            with _compat.tracing_gradients():
                self._programs.compile(
                    key,
                    donated(advance),
                    self._state,
                    batch,
                    mode=self._mode,
                    what="the training step",
                    check=self._check,
                )
        except _compat.UnsupportedByDynamo as error:
            raise NotRead(not_captured_message(_compat.user_frames(error), str(error))) from error
        self._forms[key] = {}

    def _run(self, key: Key, advance: Any, batch: tuple[Any, ...], proof: Proof | None) -> None:
        """Capture by running, compile, and take the first step."""
        if self._mode == "eager":
            step: Any = donated(advance)
        else:
            contents = Contents({"model": self._model, "loss_fn": self._loss_fn})
            try:
                step = CapturedStep(advance, self._state, batch)
            finally:
                contents.restore()
            program = Program(step.graph, captured_by="run")
            refuse_host_syncs(program.findings(thorough=False))
            step.compile(self._state, batch, mode=self._mode, backend=self._plan.options.backend)
        fresh = step(self._state, batch)
        if proof is not None and (objection := proof.objection(self._state)):
            proof.undo(self._state)
            raise ValueError(
                f"the captured step is not the ordinary loop's: {objection}. Nothing was changed. mode='eager' runs "
                f"the loss as it is; please report the model."
            )
        if self._mode != "eager":
            self._programs.captured[key] = program
        self._forms[key] = self._carried.forms
        self._programs.keep(key, step)
        self._give_back(self._forms[key], fresh)

    def _check(self, program: Program) -> None:
        if _recomputes_between_backwards(program):
            raise GraphRefused(
                "the step checkpoints activations and has several backwards, and torch recomputes activations in one "
                "backward only.",
                program,
            )
        # On a GPU a sync in the backward breaks the capture minutes later, so the whole graph is searched at once.
        refuse_host_syncs(program.findings(thorough=self._plan.update.layout.device.type == "cuda"))

    def _adopt(self, facts: LossFacts) -> None:
        """Add state entries for the metrics and buffers of the loss. Warn once about parameters it never reads."""
        taken = step_metrics(self._plan.update, self._state)
        for name in facts.metrics:
            if name in taken:
                raise ValueError(
                    f"the metric name {name!r} is taken by the step itself; give the loss's metric another one."
                )
        device = self._plan.update.layout.device
        for name, (shape, dtype) in facts.metrics.items():
            self._state[keys.metrics(name)] = torch.zeros(shape, dtype=dtype, device=device)
        for name, buffer in self._residence.keep_buffers(facts.changed_buffers).items():
            self._state[keys.buffers(name)] = buffer
        for key, tensor in self._state.items():
            if keys.split(key)[0] in (keys.METRICS, keys.BUFFERS):
                _compat.mark_static(tensor)
        self.facts = facts
        if facts.unused:
            self._warn(
                "unused",
                f"the loss never reads {', '.join(facts.unused)}: their gradient counts as zero, so weight decay "
                f"still acts. Freeze them (requires_grad=False) before compile_training_step() to leave them alone.",
            )


def _recomputes_between_backwards(program: Program) -> bool:
    return program.checkpoints > 0 and program.backwards > 1
