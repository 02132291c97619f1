"""`compile_training_step`: forward, backward and optimizer as one program over flat state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._program.lower import lower, no_recompile, resolve_mode
from fusion_compile._program.program import Program, refuse_host_syncs
from fusion_compile._progress import stage
from fusion_compile._state import checkpoint, flat_tree
from fusion_compile._state.banks import Layout, build_layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.residence import Residence
from fusion_compile._state.routing import Route, SplitBlocks, route
from fusion_compile._state.warm_start import WarmStart, carry_over
from fusion_compile._step import batches
from fusion_compile._step.host_reads import not_captured_message
from fusion_compile._step.loss import LossFacts, LossFn, LossModule, examine
from fusion_compile._step.periodic import PeriodicWork
from fusion_compile._step.pure_step import CLIP, StepPlan, donated, initial_state, pure_step
from fusion_compile._types import Tensors
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._subjects.step import explain_step
from fusion_compile.optim._resolve import resolve_optimizer
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Context, Transform, bound

MAX_PROGRAMS = 8
"""Different batch shapes that one step compiles before it refuses another."""


class _DisjointBackwards(ValueError):
    """A graph that checkpoints activations and has several backwards, between which torch cannot recompute."""


class TrainingStep:
    """A compiled training step. Call it with a batch; the module it was built from always holds the deployable weights.

    Attributes: `hyperparameters` (live numbers and schedules), `metrics`, `routes` (which parameter went where and
    why), `layout` (banks), `programs` (what was captured). Made by `compile_training_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        transform: Transform,
        routes: tuple[Route, ...],
        layout: Layout,
        hyperparameters: Mapping[str, float | Schedule],
        *,
        accumulate: int,
        skip_nonfinite: bool,
        compute_dtype: torch.dtype | None,
        mode: str,
        backend: str,
    ) -> None:
        self.model, self.transform, self.routes, self.layout = model, transform, routes, layout
        self.mode, self.backend = mode, backend
        self._loss_fn = loss_fn
        self._training = model.training
        self.hyperparameters = Hyperparameters(hyperparameters, layout.device, layout.state_dtype)
        self._residence = Residence(model, layout)
        params = {k: b.to(layout.state_dtype) for k, b in self._residence.banks.items()}
        optimizer_state = transform.init(params)
        self._plan = StepPlan(
            layout,
            transform,
            flat_tree.form(optimizer_state, "optimizer"),
            self.hyperparameters,
            accumulate,
            skip_nonfinite,
            compute_dtype,
        )
        self._state = initial_state(self._plan, self._residence.banks, optimizer_state)
        for tensor in self._state.values():
            _compat.mark_static(tensor)
        self._facts: LossFacts | None = None
        # By signature, and by whether the transform's period makes it another kind of step.
        self._compiled: dict[batches.Signature, dict[bool, Callable[[Tensors, tuple[Any, ...]], None]]] = {}
        self.programs: list[Program] = []
        self._periodic = PeriodicWork(self._plan, mode=mode, backend=backend)
        self.steps_called = 0
        self._released = False

    # ------------------------------------------------------------------ the step

    def __call__(self, *batch: Any) -> Tensor:
        """One step on `batch`; the loss, 0-dim, on the device. Nothing waits for the device.

        Raises ValueError/TypeError for a batch or loss the program cannot take and RuntimeError for a model that was
        rebound; the state is then as before the call.
        """
        if self._released:
            raise RuntimeError("this training step was released; call compile_training_step() again to train on.")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a training step was asked for inside torch.inference_mode(); call it outside.")
        if self.model.training != self._training:
            now, then = ("train", "eval") if self.model.training else ("eval", "train")
            raise RuntimeError(
                f"the model is in {now} mode, but the step was compiled in {then} mode; call model.{then}() before "
                f"the step."
            )
        self._residence.check()
        signature = batches.signature(batch, self.layout.device)
        due = self.transform.period > 0 and self.steps_called % self.transform.period == 0
        run = self._compiled.get(signature, {}).get(due)
        self.hyperparameters.apply_schedules(self.steps_called)
        if run is None:
            self._compile(signature, batch, due)
        else:
            with torch.enable_grad(), no_recompile():
                run(self._state, batch)
        self.steps_called += 1
        self._periodic.after_step(self.steps_called, self._state)
        self._residence.say_written()
        return self._state["metrics/loss"].clone()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Of the last step, on the device: loss, grad_norm (before clipping), update_norm, step and skipped (counts),
        every hyperparameter, what the optimizer's parts tell (``fusion/…``, ``comp/…``), and the user's own. Copies,
        safe to keep; reading one on the host waits for the device (`ScalarLogger` reads without waiting)."""
        out = {k.removeprefix("metrics/"): v.clone() for k, v in self._state.items() if k.startswith("metrics/")}
        out |= {k.removeprefix("counts/"): v.clone() for k, v in self._state.items() if k.startswith("counts/")}
        numbers = self.hyperparameters.by_name(self.hyperparameters.tensor.clone())
        tells = self.transform.diagnostics
        optimizer = flat_tree.unflatten(self._plan.optimizer_form, self._state)
        told = {} if tells is None else {k: v.clone() for k, v in tells(optimizer).items()}
        return {**numbers, **told, **out}

    @property
    def periodic_programs(self) -> dict[str, Program]:
        """What was captured of the work that the optimizer does now and then, by name."""
        return dict(self._periodic.programs)

    def _compile(self, signature: batches.Signature, batch: tuple[Any, ...], due: bool) -> None:
        """Compile the program for a batch of this signature and take its first step."""
        batches.check_same_kind(signature, self._compiled)
        if len({*self._compiled, signature}) > MAX_PROGRAMS:
            raise ValueError(
                f"this would be batch shape number {MAX_PROGRAMS + 1}: each shape is a program of its own. Pad or "
                f"bucket the batches, or drop the last incomplete one (DataLoader(drop_last=True))."
            )
        accumulate = self._plan.accumulate
        if accumulate > 1:
            batches.check_divisible(batch, accumulate)
        weights = self.layout.views(self._residence.banks)
        example = batches.micro_batch(batch, 0, accumulate) if accumulate > 1 else batch
        facts = examine(self.model, self._loss_fn, weights, example, self._plan.compute_dtype)
        if self._facts is None:
            self._adopt(facts)
        elif facts != self._facts:
            raise ValueError(
                f"with this batch shape the loss {facts.difference(self._facts)}; compile another step for it."
            )
        loss = LossModule(self.model, self._loss_fn, facts.changed_buffers, self._plan.compute_dtype)
        what = f"compiling the training step ({self.mode if self.backend == 'inductor' else self.backend})"
        with stage(what), _compat.tracing_gradients(), torch.enable_grad():
            try:
                run = self._first_run(pure_step(self._plan, loss, facts, due=due), batch)
            except _DisjointBackwards:
                run = self._first_run(pure_step(self._plan, loss, facts, one_backward=True, due=due), batch)
        self._compiled.setdefault(signature, {})[due] = run

    def _first_run(self, advance: Callable[[Tensors, tuple[Any, ...]], Tensors], batch: tuple[Any, ...]) -> Any:
        """Compile `advance` and take the first step with it. What refused the graph is raised; nothing has run then."""

        def observe(graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
            program = Program(graph)
            if program.checkpoints and program.backwards > 1:
                raise _DisjointBackwards
            # On a GPU a sync in the backward breaks the capture minutes later, so the whole graph is searched at once.
            refuse_host_syncs(program.findings(thorough=self.layout.device.type == "cuda"))
            self.programs.append(program)

        programs = len(self.programs)
        run = lower(_compat.own_code(donated(advance)), mode=self.mode, backend=self.backend, on_graph=observe)
        try:
            run(self._state, batch)
        except Exception as error:
            del self.programs[programs:]
            if isinstance(error, _compat.UnsupportedByDynamo):
                raise ValueError(not_captured_message(_compat.user_frames(error), str(error))) from error
            if refusal := _compat.refusal_inside(error):
                raise refusal from None
            raise
        return run

    def _adopt(self, facts: LossFacts) -> None:
        """Make room for what the loss was seen to produce; warn once about parameters it never reads."""
        taken = {*self.metrics}
        for name in facts.metrics:
            if name in taken:
                raise ValueError(
                    f"the metric name {name!r} is taken by the step itself; give the loss's metric another one."
                )
        for name, (shape, dtype) in facts.metrics.items():
            self._state[f"metrics/{name}"] = torch.zeros(shape, dtype=dtype, device=self.layout.device)
        for name, buffer in self._residence.keep_buffers(facts.changed_buffers).items():
            self._state[f"buffers/{name}"] = buffer
        for key, tensor in self._state.items():
            if key.startswith(("metrics/", "buffers/")):
                _compat.mark_static(tensor)
        self._facts = facts
        if facts.unused:
            warnings.warn(
                f"the loss never reads {', '.join(facts.unused)}: their gradient counts as zero, so weight decay "
                f"still acts. Freeze them (requires_grad=False) before compile_training_step() to leave them alone.",
                stacklevel=4,
            )

    def release(self) -> nn.Module:
        """End training: the parameters get memory of their own again, the state is dropped, the model is returned.

        Afterwards the model is as any other (its weights can be freed one by one) and the step refuses to run.
        """
        self._residence.move_out()
        self._state.clear()
        self._compiled.clear()
        self._residence.banks.clear()
        self._released = True
        return self.model

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All state keyed by full parameter name: ``model``, ``optimizer`` (``<part>.<parameter>``), ``counts``,
        ``hyperparameters``, ``rng``. Tensors are copies."""
        return checkpoint.state_dict(self.model, self.layout, self._state, self.hyperparameters, self.steps_called)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave, into the existing memory. All names and shapes are checked first; on a mismatch
        a ValueError lists missing, unexpected and mismatched names, and nothing is loaded."""
        self.steps_called = checkpoint.load_state_dict(
            saved, self.model, self.layout, self._state, self.hyperparameters
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint folder: safetensors and a JSON index that is renamed into place last."""
        checkpoint.save(path, self.state_dict())

    def load(self, path: str | PathLike[str]) -> None:
        """Load a folder that `save` wrote; the random state comes back too, so that a resumed run is bitwise the
        same."""
        self.load_state_dict(checkpoint.load(path, self.layout.device))

    def warm_start(self, source: str | PathLike[str] | Mapping[str, Any]) -> WarmStart:
        """Begin this training from a checkpoint of the same model under *another* recipe: weights, and what of the
        optimizer's state both have (z, momenta, second moments, …).

        `source`: a folder that `save` wrote, or what `state_dict` gave. Counts, hyperparameters and random state stay
        as they are here. Returns what was carried, what begins anew and what found no use; printing it sums it up. A
        checkpoint of another model is a ValueError and nothing is loaded.
        """
        saved = source if isinstance(source, Mapping) else checkpoint.load(source, self.layout.device)
        checkpoint.load_model(saved, self.model)
        with torch.no_grad():
            for key, bank in self._residence.banks.items():
                self._state[f"params/{key}"].copy_(bank)
            params = {b.key: self._state[f"params/{b.key}"] for b in self.layout.banks}
            for path, tensor in flat_tree.flatten(self.transform.init(params), "optimizer"):
                self._state[path].copy_(tensor)
        self._residence.say_written()
        own = checkpoint.named_state(self.layout, self._state)
        return carry_over(saved["optimizer"], own, tuple(r.name for r in self.routes))

    def gradient_point(self) -> Tensors:
        """The weights at which the next gradient is taken, by parameter name (Schedule-Free's y); copies."""
        params = {b.key: self._state[f"params/{b.key}"] for b in self.layout.banks}
        move = self.transform.gradient_point
        if move is not None:
            numbers = self.hyperparameters.by_name(self.hyperparameters.tensor)
            params = move(params, flat_tree.unflatten(self._plan.optimizer_form, self._state), Context(numbers))
        return {n: v.clone() for n, v in self.layout.views(params).items()}

    def explain(self, *, device: str | None = None) -> Explanation:
        """Where every parameter went and what was captured; see `fusion_compile.explain`."""
        return explain_step(
            title=repr(self),
            model=self.model,
            banks=self._residence.banks,
            routes=self.routes,
            layout=self.layout,
            state=self._state,
            hyperparameters=self.hyperparameters,
            programs=self.programs,
            periodic_programs=self.periodic_programs,
            unused=() if self._facts is None else self._facts.unused,
            device=device,
        )

    def __repr__(self) -> str:
        matrices = sum(r.role == "spectral" for r in self.routes)
        return (
            f"TrainingStep({self.transform.name}, {len(self.routes)} parameters in {len(self.layout.banks)} banks "
            f"({matrices} spectral), mode={self.mode!r}, {len(self.programs)} programs)"
        )


def compile_training_step(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    optimizer: str | Transform = "sf_normuon",
    lr: float | Schedule | None = None,
    compute_dtype: torch.dtype | None = None,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    skip_nonfinite: bool = True,
    mode: str | None = None,
    backend: str = "inductor",
    force_scalar: Sequence[str] = (),
    force_spectral: Sequence[str] = (),
    split_blocks: SplitBlocks = None,
) -> TrainingStep:
    """Turn forward, backward and optimizer of `model` into one compiled program.

    `loss_fn`: ``(model, *batch) -> loss`` or ``(loss, {name: metric})``, a 0-dim loss; it may draw noise and
    timesteps on the device. `optimizer`: a recipe's name (``fusion_compile.optim.RECIPES``) or a `Transform`. `lr`:
    replaces the recipe's (unit: see the recipe). `compute_dtype`: weights and the model's floating inputs are cast to
    it inside the program; state stays fp32. `accumulate`: micro-batches per step, run inside the program; the loss
    and its gradient are their means. `clip_grad_norm`: bound on the global gradient norm; live under that name.
    `skip_nonfinite`: a step whose gradient norm is not finite in fp32 changes nothing and counts in
    ``metrics["skipped"]``. `mode`: torch.compile's modes or ``"eager"`` (the same step, uncompiled); None is
    ``"max-autotune"`` on CUDA, ``"default"`` on a CPU. `force_scalar`, `force_spectral`: regular expressions over
    full parameter names that override the routing. `split_blocks`: fused matrices (q, k and v; gate and up; adaLN's
    six) that are orthogonalized block by block (CMuon): ``"auto"`` by name, or ``{regular expression: blocks}``, see
    docs/optimizers.md.

    The model's parameters become views into banks (their objects stay). From then on they always hold the deployable
    weights: with Schedule-Free the average x. Half-precision parameters get an fp32 master copy in the state.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; compile_training_step needs a torch.nn.Module.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; it must be callable as loss_fn(model, *batch).")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(
            f"accumulate={accumulate!r} is not a number of micro-batches; give a whole number, at least 1."
        )
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise ValueError(
            f"compute_dtype={compute_dtype} is not a floating-point dtype; give torch.bfloat16, for example."
        )
    transform = _resolve(optimizer)
    hyperparameters = dict(transform.hyperparameters)
    if lr is not None:
        if "lr" not in hyperparameters:
            raise ValueError(
                f"lr was given, but {transform.name} has no hyperparameter 'lr'; it has {', '.join(hyperparameters)}."
            )
        hyperparameters["lr"] = lr
    hyperparameters[CLIP] = float("inf") if clip_grad_norm is None else clip_grad_norm
    roles = transform.roles or ("scalar",)
    routes = route(model, roles, force_scalar, force_spectral, split_blocks)
    stray = [r.name for r in routes if r.role not in roles]
    if stray:
        raise ValueError(
            f"{transform.name} handles only {', '.join(roles)} parameters, but {stray[0]} is not one; give the rest "
            f"a transform "
            f"of their own: optim.partition({{'spectral': …, 'scalar': …}})."
        )
    layout = build_layout(model, routes)
    transform = bound(transform, layout.infos)
    return TrainingStep(
        model,
        loss_fn,
        transform,
        routes,
        layout,
        hyperparameters,
        accumulate=accumulate,
        skip_nonfinite=skip_nonfinite,
        compute_dtype=compute_dtype,
        mode=resolve_mode(mode, layout.device),
        backend=backend,
    )


def _resolve(optimizer: str | Transform) -> Transform:
    return resolve_optimizer(optimizer)
