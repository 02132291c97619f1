"""The programs of a training step, one for each kind of batch, and what the first run of the loss adds to the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._program.program import Program, refuse_host_syncs
from fusion_compile._program.programs import GraphRefused, Programs
from fusion_compile._say_once import SayOnce
from fusion_compile._state import keys
from fusion_compile._state.residence import Residence
from fusion_compile._step import batches
from fusion_compile._step.host_reads import not_captured_message
from fusion_compile._step.loss import LossFacts, LossFn, LossModule, examine
from fusion_compile._step.metrics import step_metrics
from fusion_compile._step.pure_step import StepPlan, pure_step
from fusion_compile._step.update import donated
from fusion_compile._types import Tensors

MAX_PROGRAMS = 8
"""Different batch shapes that one step compiles before it refuses another."""


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
        with torch.enable_grad():
            if not self._programs.rerun((signature, due), self._state, batch):
                self._compile(signature, batch, due)
                self._signatures[signature] = None

    def _compile(self, signature: batches.Signature, batch: tuple[Any, ...], due: bool) -> None:
        batches.check_same_kind(signature, self._signatures)
        if len({*self._signatures, signature}) > MAX_PROGRAMS:
            raise ValueError(
                f"this would be batch shape number {MAX_PROGRAMS + 1}: each shape is a program of its own. Pad or "
                f"bucket the batches, or drop the last incomplete one (DataLoader(drop_last=True))."
            )
        options = self._plan.options
        if options.accumulate > 1:
            batches.check_divisible(batch, options.accumulate)
        weights = self._plan.update.layout.views(self._residence.banks)
        example = batches.micro_batch(batch, 0, options.accumulate) if options.accumulate > 1 else batch
        facts = examine(self._model, self._loss_fn, weights, example, options.compute_dtype)
        if self.facts is None:
            self._adopt(facts)
        elif facts != self.facts:
            raise ValueError(
                f"with this batch shape the loss {facts.difference(self.facts)}; compile another step for it."
            )
        loss = LossModule(self._model, self._loss_fn, facts.changed_buffers, options.compute_dtype)
        try:
            self._first_run((signature, due), pure_step(self._plan, loss, facts, due=due), batch)
        except GraphRefused as refusal:
            if not _recomputes_between_backwards(refusal.program):
                raise
            self._first_run((signature, due), pure_step(self._plan, loss, facts, one_backward=True, due=due), batch)

    def _first_run(self, key: Any, advance: Any, batch: tuple[Any, ...]) -> None:
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
            raise ValueError(not_captured_message(_compat.user_frames(error), str(error))) from error

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
