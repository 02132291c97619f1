"""One training step as a pure function over flat state: ``advance(state, batch) -> the tensors that changed``.

Everything a step does is here and nowhere else: forward, backward, accumulation, clipping, the non-finite skip, the
optimizer, averaging, buffers and metrics. ``donated`` is the same function with the results written into the state's
own tensors; Inductor turns those writes into in-place kernels without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._state import flat_tree
from fusion_compile._state.banks import Layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._step.batches import micro_batch
from fusion_compile._step.loss import LossFacts, LossModule, cast_buffers
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, State, Transform
from fusion_compile.optim.clip_by_global_norm import clip_factor, global_norm

CLIP = "clip_grad_norm"
"""The hyperparameter that the step itself adds: the bound on the gradient's global norm (infinite: none)."""


@dataclass(frozen=True)
class StepPlan:
    """All that is fixed when a step is compiled. `optimizer_form`: the optimizer's state with paths for tensors."""

    layout: Layout
    transform: Transform
    optimizer_form: Any
    hyperparameters: Hyperparameters
    accumulate: int
    skip_nonfinite: bool
    compute_dtype: torch.dtype | None


def initial_state(plan: StepPlan, module_banks: Tensors, optimizer: Any) -> Tensors:
    """The flat state before the first step.

    Keys: ``params/<bank>`` (in the state dtype; the module's own banks where the dtypes agree), ``module/<bank>`` (the
    module's banks where they are of lower precision), ``optimizer/<path>``, ``hyperparameters``, ``counts/…``,
    ``metrics/…``. Buffers and the user's metrics join when the loss is first seen.
    """
    dtype, device = plan.layout.state_dtype, plan.layout.device
    state: Tensors = {}
    for key, bank in module_banks.items():
        same = bank.dtype == dtype
        state[f"params/{key}"] = bank if same else bank.to(dtype)
        if not same:
            state[f"module/{key}"] = bank
    state.update(flat_tree.flatten(optimizer, "optimizer"))
    state["hyperparameters"] = plan.hyperparameters.tensor
    for name in ("step", "skipped"):
        state[f"counts/{name}"] = torch.zeros((), dtype=torch.int64, device=device)
    for name in ("loss", "grad_norm", "update_norm"):
        state[f"metrics/{name}"] = torch.zeros((), dtype=dtype, device=device)
    return state


def pure_step(
    plan: StepPlan, loss: LossModule, facts: LossFacts, *, one_backward: bool = False, due: bool = False
) -> Callable[[Tensors, tuple[Any, ...]], Tensors]:
    """The step as a function that changes none of its arguments and returns the new values by key.

    `due`: one of the steps that the transform's `period` singles out. `one_backward`: with `accumulate`, all forwards
    before one backward instead of by turns. torch recomputes checkpointed activations in one backward region only, so
    a step that checkpoints and accumulates needs this form.
    """
    layout, transform, cast_to = plan.layout, plan.transform, plan.compute_dtype

    def forward(point: Tensors, buffers: Tensors, batch: tuple[Any, ...]) -> tuple[Tensors, Tensor, Tensors, Tensors]:
        """leaves, loss, metrics, buffers after; at the weights `point`. The leaves are this forward's own."""
        if cast_to is not None:
            weights = layout.views({k: p.to(cast_to) for k, p in point.items()})
        else:
            weights = {
                p.name: v if v.dtype == b.dtype else v.to(b.dtype)
                for b in layout.banks
                for p, v in zip(b.places, b.split(point[b.key]), strict=True)
            }
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        with torch.enable_grad(), _compat.region("forward"):
            value, metrics, after = loss.run(leaves, buffers, batch)
        return leaves, value, {k: m.detach() for k, m in metrics.items()}, {k: b.detach() for k, b in after.items()}

    def backward(values: list[Tensor], forwards: list[Tensors]) -> Tensors:
        """Gradient banks of the sum of `values`, summed over the leaves of `forwards` in the state dtype."""
        used = [(i, n) for i, leaves in enumerate(forwards) for n in leaves if n not in facts.unused]
        with torch.enable_grad(), _compat.region("backward"):
            found = torch.autograd.grad(_sum(values), [forwards[i][n] for i, n in used])
        by_place = dict(zip(used, found, strict=True))
        total: Tensors = {}
        for i, leaves in enumerate(forwards):
            named = {n: by_place[i, n] if (i, n) in by_place else torch.zeros_like(w) for n, w in leaves.items()}
            banks = layout.join(named)
            total = banks if i == 0 else {k: g + banks[k] for k, g in total.items()}
        return total

    def with_written_weights(state: Tensors) -> Tensors:
        """`state`, in which a lower-precision module's weights count wherever they are not the rounding of their
        master: there somebody wrote into the module (``load_state_dict``, ``p.data.copy_``) since the last step."""
        masters: Tensors = {}
        for b in layout.banks:
            if b.dtype != layout.state_dtype:
                master, module = state[f"params/{b.key}"], state[f"module/{b.key}"]
                masters[f"params/{b.key}"] = torch.where(master.to(b.dtype) == module, master, module.to(master.dtype))
        return {**state, **masters}

    def advance(state: Tensors, batch: tuple[Any, ...]) -> Tensors:
        state = with_written_weights(state)
        params = {b.key: state[f"params/{b.key}"] for b in layout.banks}
        optimizer = flat_tree.unflatten(plan.optimizer_form, state)
        numbers = plan.hyperparameters.by_name(state["hyperparameters"])
        context = Context(numbers, due=due)
        point = params if transform.gradient_point is None else transform.gradient_point(params, optimizer, context)

        before = {n: state[f"buffers/{n}"] for n in facts.changed_buffers}
        buffers = before
        values: list[Tensor] = []
        forwards: list[Tensors] = []
        grads: Tensors = {}
        metrics: Tensors = {}
        for i in range(plan.accumulate):
            part = batch if plan.accumulate == 1 else micro_batch(batch, i, plan.accumulate)
            # A clone, because the loss may write into its buffers and the old values are needed for a skipped step.
            own = cast_buffers(loss.model, {n: b.clone() for n, b in buffers.items()}, facts.changed_buffers, cast_to)
            leaves, value, found, buffers = forward(point, {**frozen_buffers(), **own}, part)
            values.append(value)
            metrics = {k: metrics[k] + m if i else m for k, m in found.items()}
            if one_backward:
                forwards.append(leaves)
            else:
                banks = backward([value], [leaves])
                grads = {k: grads[k] + g if i else g for k, g in banks.items()}
        if one_backward:
            grads = backward(values, forwards)
        value = _sum([v.detach() for v in values])
        if plan.accumulate > 1:
            value = value / plan.accumulate
            grads = {k: g / plan.accumulate for k, g in grads.items()}
            metrics = {k: m / plan.accumulate for k, m in metrics.items()}

        with _compat.region("optimizer"):
            norm = global_norm(grads)
            factor = clip_factor(norm, numbers[CLIP])
            clipped = {k: g * factor.to(g.dtype) for k, g in grads.items()}
            updates, optimizer = transform.update(clipped, optimizer, params, context._replace(loss=value))
            new: Tensors = {f"params/{k}": p + updates[k] for k, p in params.items()}
        # What a transform hands back untouched (a basis that its periodic work renews) is not written.
        new.update((k, t) for k, t in flat_tree.flatten(optimizer, "optimizer") if t is not state[k])
        new.update({f"buffers/{n}": buffers[n].to(b.dtype) for n, b in before.items()})
        new["counts/step"] = state["counts/step"] + 1
        new["metrics/update_norm"] = global_norm(updates)
        if plan.skip_nonfinite:
            finite = torch.isfinite(norm)
            new = {k: torch.where(finite, t, state[k]) for k, t in new.items()}
            new["counts/skipped"] = state["counts/skipped"] + (~finite)
        new["metrics/loss"], new["metrics/grad_norm"] = value, norm
        new.update({f"metrics/{k}": m for k, m in metrics.items()})
        for b in layout.banks:
            if b.dtype != layout.state_dtype:
                new[f"module/{b.key}"] = new[f"params/{b.key}"].to(b.dtype)
        return new

    def frozen_buffers() -> Tensors:
        """Buffers that need another dtype than the module's; the others are the module's own."""
        if cast_to is None:
            return {}
        unchanged = {n: b for n, b in loss.model.named_buffers() if n not in facts.changed_buffers}
        return cast_buffers(loss.model, unchanged, (), cast_to)

    return advance


def _sum(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def pure_periodic(plan: StepPlan, work: Callable[[State, Tensors, Context], State]) -> Callable[[Tensors], Tensors]:
    """A transform's periodic `work` as a pure function of the flat state; returns what it changed, by key."""

    def refresh(state: Tensors) -> Tensors:
        params = {b.key: state[f"params/{b.key}"] for b in plan.layout.banks}
        context = Context(plan.hyperparameters.by_name(state["hyperparameters"]))
        with _compat.region("optimizer"):
            after = work(flat_tree.unflatten(plan.optimizer_form, state), params, context)
        return {k: t for k, t in flat_tree.flatten(after, "optimizer") if t is not state[k]}

    return refresh


def donated(advance: Callable[..., Tensors]) -> Callable[..., None]:
    """`advance` (of the state, and for a step of a batch) with its results written into the state's own tensors."""

    def step(state: Tensors, *batch: tuple[Any, ...]) -> None:
        with torch.no_grad():
            for key, value in advance(state, *batch).items():
                _compat.write(state[key], value)

    return step
