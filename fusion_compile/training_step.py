"""`compile_training_step`: forward, backward and optimizer as one program over flat state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._notebook import table
from fusion_compile._program.lower import resolve_mode
from fusion_compile._program.program import Program
from fusion_compile._program.programs import Programs
from fusion_compile._program.saved.folder import load_program, refuse_uncompiled
from fusion_compile._ranks.meeting import Meeting
from fusion_compile._state import flat_tree, keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.blocks import SplitBlocks
from fusion_compile._state.half_precision import noise_for
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.kept_average import averages_of
from fusion_compile._state.residence import Residence
from fusion_compile._state.routing import Route
from fusion_compile._step.arrays import from_numpy_takes_tensors
from fusion_compile._step.evaluates import Evaluates
from fusion_compile._step.evaluation import Evaluation
from fusion_compile._step.known_batches import KnownBatches
from fusion_compile._step.lifetime import Lifetime
from fusion_compile._step.loss import LossFn
from fusion_compile._step.loss_scale import LossScale
from fusion_compile._step.metrics import step_metrics
from fusion_compile._step.models import refuse_model, refuse_other_kinds
from fusion_compile._step.options import Granularity, StepOptions, refuse_regions
from fusion_compile._step.periodic import FirstTaken, run_due_work, work_key
from fusion_compile._step.planned import Forced, plan_update
from fusion_compile._step.precision import Precision
from fusion_compile._step.pure_step import StepPlan, initial_state
from fusion_compile._step.saves import Saves
from fusion_compile._step.step_programs import StepPrograms
from fusion_compile._step.together import (
    communication,
    divided,
    meeting_of,
    narrowed_of,
    notes_of,
    refuse_on_ranks,
    share_state,
    share_weights,
    together,
)
from fusion_compile._step.turn import in_turn
from fusion_compile._step.update import UpdatePlan
from fusion_compile._step.way import Capture
from fusion_compile.ema import EMA
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._subjects.step import StepParts, explain_step
from fusion_compile.optim._resolve import OptimizerChoice
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform


class TrainingStep(Evaluates, Saves):
    """A compiled training step, made by `compile_training_step`. Call it with a batch.

    Attributes:
        model: The module, which always holds the deployable weights.
        hyperparameters: Live numbers and schedules by name. Setting one counts from the next step.
        metrics: Numbers of the last step, on the device.
        routes: Which parameter went where, and why.
        layout: The banks.
        programs: What was captured, in order.
        steps_called: Calls so far.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Linear(4, 2)
        >>> step = fc.compile_training_step(model, lambda model, x: model(x).square().mean(), mode="eager")
        >>> loss = step(torch.randn(8, 4))
        >>> step.hyperparameters["lr"] = 1e-3
        >>> int(step.metrics["step"])
        1
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        transform: Transform,
        routes: tuple[Route, ...],
        layout: Layout,
        hyperparameters: Mapping[str, float | Schedule],
        options: StepOptions,
        meeting: Meeting | None = None,
    ) -> None:
        precision = Precision(model, options.compute_dtype, layout.device, options.keep_fp32)
        self.model, self.transform, self.routes, self.layout = model, transform, routes, layout
        self.mode, self.backend = resolve_mode(options.mode, layout.device, options.backend), options.backend
        self.hyperparameters = Hyperparameters(hyperparameters, layout.device, layout.state_dtype)
        Lifetime.__init__(self, model, Residence(model, layout))
        self._meeting, division = meeting, None if meeting is None else meeting.division
        if meeting is not None:
            share_weights(meeting, model, self._residence.banks)
        banks = self._residence.banks if division is None else division.own(self._residence.banks)
        own = layout if division is None else division.owned
        optimizer = transform.init({k: b.to(layout.state_dtype) for k, b in banks.items()})
        form = flat_tree.form(optimizer, keys.OPTIMIZER)
        noise = noise_for(options.half_precision, own, banks)
        update = UpdatePlan(own, transform, form, self.hyperparameters, noise, narrowed_of(meeting))
        self._plan = StepPlan(update, options, precision, division)
        self._state = initial_state(update, banks, optimizer, options.half_precision, self._plan.loss_scale)
        if division is not None:
            share_state(division, self._state, self._residence.banks, moves=transform.gradient_point is not None)
        self._residence.keep(options.averages, self._state, gradients=options.keep_gradients)
        if (divides := self._divides_weights()) is not None:
            self._residence.empty(divides.divided)
        self._residence.notes_writes |= self._publishing() is not None
        self._programs = StepPrograms(
            model, loss_fn, self._plan, self._residence, self._state, mode=self.mode, meeting=meeting
        )
        self.steps_called, self._evaluation = 0, Evaluation(model, loss_fn, self._plan, mode=self.mode)
        self._periodic, self._is_first = Programs(self.backend), FirstTaken(self._plan.update)
        self._versions_seen = self._residence.versions()
        self._batches = KnownBatches(layout.device, fixed=options.fixes_numbers, compiled=self.mode != "eager")

    @in_turn
    def __call__(self, *batch: Any) -> Tensor:
        """Take one step on `batch`. Nothing waits for the device.

        The first call with a batch shape compiles. Further shapes are programs of their own, at most `max_shapes`.

        Args:
            *batch: What `loss_fn` gets after the model: tensors on the model's device, in tuples, lists, dictionaries,
                dataclasses and plain objects. Numpy arrays are tensors for it, of the same dtype. A number in
                arithmetic on tensors may change; each other value has a program.

        Returns:
            The loss, 0-dim and on the device: the mean over micro-batches, at the weights before the step.

        Raises:
            ValueError: A batch or loss that the program cannot take. The state is then as before the call.
            TypeError: An object in the batch that no program takes, or a loss that is no tensor.
            RuntimeError: The model was rebound, frozen or switched between train and eval, or the step was released.
        """
        with self._together("takes a step"):
            return self._taken(batch)

    def _taken(self, batch: tuple[Any, ...]) -> Tensor:
        self._check_alive()
        self._check_mode(self.model)
        self._take_up_weights()
        self._take_written()
        batch, signature, numpys = self._batches.taken(batch)
        due = self.transform.period > 0 and self.steps_called % self.transform.period == 0
        self.hyperparameters.apply_schedules(self.steps_called)
        with self._turn.writing(), from_numpy_takes_tensors() if numpys else nullcontext():
            with nullcontext() if self._meeting is None else self._point_gathered():
                self._programs.run(signature, batch, due)
            self.steps_called += 1
            first = self._is_first(self._state)
            run_due_work(self._plan.update, self.steps_called, self._state, self._periodic, mode=self.mode, first=first)
            self._residence.say_written()
            if self._meeting is not None:
                self._versions_seen = self._residence.versions()
                self._stepped()
        return self._state[keys.metrics("loss")].clone()

    @property
    @in_turn
    def metrics(self) -> dict[str, Tensor]:
        """Numbers of the last step, on the device.

        They are the loss, grad_norm (before clipping), update_norm, step and skipped (counts), every hyperparameter,
        diagnostics of the optimizer's parts (``fusion/…``, ``comp/…``; of a named group ``<group>/…``), and the loss's
        metrics. All are copies. Reading one on the CPU waits for the device; `ScalarLogger` does not.
        """
        self._check_alive()
        return step_metrics(self._plan.update, self._state, self._programs.shown)

    @property
    def programs(self) -> list[Program]:
        """The captured programs of the step, in order; empty with ``mode="eager"``."""
        return self._programs.captured

    @property
    def periodic_programs(self) -> dict[str, Program]:
        """The captured programs of the optimizer's periodic work, by name."""
        works = self.transform.periodic
        found = {work.name: self._periodic.captured.get(work_key(i, work)) for i, work in enumerate(works)}
        return {name: program for name, program in found.items() if program is not None}

    @in_turn
    def release(self) -> nn.Module:
        """End training: give the parameters memory of their own again and drop the state.

        Returns:
            The model, which is then like any other. The step refuses what needs its state; a second call does nothing.
        """
        if self._released:
            return self.model
        self._move_out()
        self._state.clear()
        for programs in (self._programs, self._periodic, self._evaluation):
            programs.forget()
        self._residence.banks.clear()
        self._released = True
        return self.model

    def recapture(self) -> None:
        """Capture again at the next call: what the loss read (a flag, a module, a number) has changed. State stays."""
        self._check_alive()
        self._programs.recapture()

    def explain(self, *, device: str | None = None) -> Explanation:
        """Explain where every parameter went and what was captured; see `fusion_compile.explain`.

        Args:
            device: The device whose peak rates the roofline times assume.

        Returns:
            The explanation; printing it gives the report.
        """
        self._check_alive()
        facts, notes = self._programs.facts, [note(self.layout.device.type) for note in self.transform.notes]
        parts = StepParts(
            model=self.model,
            layout=self.layout,
            routes=self.routes,
            banks=self._residence.banks,
            state=self._state,
            hyperparameters=self.hyperparameters,
            programs=self.programs,
            periodic_programs=self.periodic_programs,
            unused=() if facts is None else facts.unused,
            because=self._programs.notices.because,
            choices=[*notes, *notes_of(self._meeting), *self._plan.precision.notes(), *self._programs.notices.lines],
            communication=communication(self._meeting, self.programs),
        )
        return explain_step(repr(self), parts, device=device)

    def _repr_html_(self) -> str:
        return table(("parameter", "role", "why"), [(r.name, r.role, r.reason) for r in self.routes], repr(self))

    def __repr__(self) -> str:
        banks, matrices = len(self.layout.banks), sum(r.role == "spectral" for r in self.routes)
        programs = f"{len(self.programs)} program" + "s" * (len(self.programs) != 1)
        held = f"{len(self.routes)} parameters in {banks} banks ({matrices} spectral)"
        return f"TrainingStep({self.transform.name}, {held}, mode={self.mode!r}, {programs})"


def compile_training_step(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    optimizer: OptimizerChoice = "sf_normuon",
    lr: float | Schedule | None = None,
    groups: Sequence[Mapping[str, Any]] = (),
    compute_dtype: torch.dtype | None = None,
    keep_fp32: Sequence[str] = (),
    half_precision: str = "master",
    loss_scale: LossScale | bool | None = None,
    ema: EMA | Sequence[EMA] = (),
    accumulate: int = 1,
    weigh_by: str | None = None,
    clip_grad_norm: float | None = None,
    skip_nonfinite: bool = True,
    keep_gradients: bool = False,
    mode: str | None = None,
    backend: str = "inductor",
    capture: Capture | None = None,
    granularity: Granularity = "program",
    rehearse: bool = True,
    max_shapes: int = 8,
    dynamic: bool = False,
    force_scalar: Sequence[str] = (),
    force_spectral: Sequence[str] = (),
    split_blocks: SplitBlocks = None,
    activation_memory: float | None = None,
    program: str | PathLike[str] | None = None,
    mesh: Any = None,
    shard: str | None = None,
    reduce_dtype: torch.dtype | None = None,
    publish_every: int = 1,
) -> TrainingStep:
    """Turn forward, backward and optimizer of `model` into one compiled program.

    The model's parameters become views into banks; the `Parameter` objects stay. From then on they always hold the
    deployable weights: with Schedule-Free the average x.

    Args:
        model: The module to train, all trainable parameters on one device.
        loss_fn: ``(model, *batch) -> loss`` or ``(loss, {name: metric})`` with a 0-dim loss. It calls this `model`.
        optimizer: A recipe's name (``fusion_compile.optim.RECIPES``), a `Transform`, or a callable that makes one.
        lr: Replaces the recipe's learning rate, a number or a schedule; its unit is the recipe's.
        groups: Parameters whose numbers differ: ``[{"params": [regular expressions], "weight_decay": 0.0, "lr": 1e-4,
            "name": "no_decay"}, …]``. Expressions are searched in full parameter names. Each listed number is live as
            ``step.hyperparameters["no_decay.weight_decay"]`` and may be a schedule; a number that is not listed is the
            default group's live value. What an optimizer pools over all parameters it pools over a group, except
            ``clip_grad_norm``. `no_decay` makes the group without weight decay: ``groups=[fc.no_decay(model)]``.
        compute_dtype: ``torch.bfloat16`` or ``float16``: the loss runs under ``torch.autocast``; weights stay.
        keep_fp32: Regular expressions over full names of modules whose forward leaves autocast and gets fp32 inputs.
        half_precision: Of bf16 and fp16 weights: ``"master"``, ``"exact"``, ``"kahan"``, ``"stochastic"``, ``"round"``.
        loss_scale: Of an fp16 loss (by `compute_dtype` or weights): dynamic. `LossScale` gives its numbers, False none.
        ema: Moving averages of the deployed weights, updated in the program: `EMA`, or several with different names.
        accumulate: Micro-batches per step, run inside the program: what shares the batch's leading size is cut, into
            parts as equal as can be. Loss, gradient and metrics are means over the whole batch.
        weigh_by: Name of a metric that the loss returns, a count (of tokens) by which the micro-batches are weighed.
        clip_grad_norm: Bound on the global gradient norm, live under that name; None is no bound.
        skip_nonfinite: A step whose gradient norm or step size is not finite changes nothing, an entry whose update is
            not finite stays. Both count in ``metrics["skipped"]``.
        keep_gradients: After each call ``p.grad`` is the step's gradient, before clipping, always in the same memory.
        mode: One of torch.compile's modes or ``"eager"``. None: ``"max-autotune"`` on CUDA, ``"default"`` on a CPU.
        backend: A torch.compile backend; `mode` counts for ``"inductor"`` only.
        capture: ``"read"``: Dynamo reads the loss's bytecode. ``"run"``: the loss runs once on fake tensors and its
            operators are written down. None reads, and runs where reading cannot. See docs/training.md.
        granularity: ``"program"`` compiles the step as one; ``"region"``, for a CPU, compiles each block that forward
            and backward repeat once, so that the first call does not grow with depth, and runs it to capture it.
        rehearse: Compute loss and gradient in the ordinary way first, on copies, to see what they leave behind and to
            compare the first two steps. False saves that; state kept in Python is then not carried.
        max_shapes: Batch shapes that are compiled before another is refused; each has a program and its memory.
        dynamic: From the second shape on, one symbolic program serves a band of sizes, where torch allows it.
        force_scalar: Regular expressions over full parameter names that are updated entry by entry.
        force_spectral: Regular expressions over full parameter names that are updated as matrices.
        split_blocks: Fused matrices (q, k and v; gate and up; adaLN's six) that are orthogonalized block by block
            (CMuon): ``"auto"`` by name, or ``{regular expression: blocks}``; see docs/optimizers.md.
        activation_memory: The share of activations that are kept, above 0 up to 1; see docs/training.md. None: all.
        program: A folder of ``step.save_program`` in another process: its code is trusted, and not compiled again.
        mesh: A ``torch.distributed`` DeviceMesh over whose ranks the batch is divided: of one axis, or of two (copies,
            shards). Every rank makes the step and calls it with its own part; see docs/distributed.md.
        shard: ``"optimizer"``: the optimizer's state is divided over ranks, matrix by matrix (ZeRO-1); the default with
            several ranks. ``"replicate"``: every rank has all of it. ``"full"``: the weights are divided, too.
        reduce_dtype: dtype in which gradients travel, such as ``torch.bfloat16``; None for that of the state.
        publish_every: With Schedule-Free and ``shard="optimizer"``: gather the model's weights every so many steps.

    Returns:
        The step. Nothing is compiled before its first call.

    Raises:
        TypeError: `model` is no module, `loss_fn` is not callable, `optimizer` or a group is of the wrong kind.
        ValueError: An option does not fit: an unknown recipe, number or mode, a pattern that matches no parameter, a
            parameter in two groups, a number that the optimizer does not read.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        >>> loss_fn = lambda model, x, y: (model(x) - y).square().mean()
        >>> step = fc.compile_training_step(
        ...     model, loss_fn, optimizer="adamw", lr=1e-2, groups=[fc.no_decay(model)], mode="eager"
        ... )
        >>> x, y = torch.randn(16, 4), torch.randn(16, 1)
        >>> losses = [float(step(x, y)) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """
    refuse_other_kinds(model, loss_fn)
    meeting = meeting_of(mesh, shard, reduce_dtype, model, publish_every)
    refuse_on_ranks(meeting, granularity=granularity, program=program)
    with together(meeting, "makes a step"):
        refuse_model(model, over_ranks=mesh is not None)
        options = StepOptions(
            accumulate=accumulate,
            skip_nonfinite=skip_nonfinite,
            keep_gradients=keep_gradients,
            compute_dtype=compute_dtype,
            mode=mode,
            backend=backend,
            capture="run" if granularity == "region" and capture is None else capture,
            granularity=granularity,
            rehearse=rehearse,
            keep_fp32=keep_fp32,
            half_precision=half_precision,
            loss_scale=loss_scale,
            averages=averages_of(ema),
            weigh_by=weigh_by,
            max_shapes=max_shapes,
            dynamic=dynamic,
            activation_memory=activation_memory,
            publish_every=publish_every,
        )
        forced = Forced(force_scalar, force_spectral, split_blocks)
        planned = plan_update(model, optimizer, lr, groups, clip_grad_norm, forced, half_precision, options.rules)
        refuse_regions(options, planned.layout.device, several_ranks=mesh is not None)
        if meeting is not None:
            planned = divided(meeting, planned, options, shard, reduce_dtype)
        step = TrainingStep(model, loss_fn, *planned[:4], options, meeting)
        if program is not None:
            refuse_uncompiled(step.mode, backend)
            load_program(program, step.layout.device, [*model.modules(), loss_fn])
        return step
