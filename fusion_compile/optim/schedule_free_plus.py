"""ScheduleFree+: Schedule-Free learning whose step size follows from the loss (Defazio, 2605.19095)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._averaging import Averaging
from fusion_compile.optim._inner import BASE_AT_Z, wrap
from fusion_compile.optim._step_size import check_rates, with_rates
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import Context, Number, State, Transform, by_name, check_transform, declare
from fusion_compile.optim._tree import copy, number_like, sum_like


class ScheduleFreePlusState(NamedTuple):
    """As `ScheduleFreeState`, and three numbers of the last update: `rate`, the step size lr_t; `inner`,
    β_k ⟨g, z - x⟩; `norm`, ‖g‖₁. `smoothed`: the norm's average and its bias if `polyak_beta` is used, else empty."""

    z: Tensors
    lr_max: Tensor
    weight_sum: Tensor
    base: State
    taken: Tensors
    rate: Tensor
    inner: Tensor
    norm: Tensor
    smoothed: Tensors


def schedule_free_plus(
    base: Transform,
    lr: Number = 1.0,
    beta: Number = 0.9,
    beta_max: Number = 0.965,
    *,
    anneal: int = 0,
    c_warmup: int = 0,
    weight_decay: Number = 0.0,
    polyak_beta: Number = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    average: str = "lr_max",
) -> Transform:
    """``lr_t = lr max(0, f + β_k ⟨g, z - x⟩) / (√(π/2) ‖g‖₁)``; ``z ← z - lr_t² wd y``; `base` steps z with lr_t.

    x, y and the average are those of `schedule_free`, with lr_t for the lr. f is the loss at y, so the numerator is the
    loss at z to first order, above a lowest loss of **zero**: a loss that is shifted or can be negative breaks the
    method. ⟨⟩ and ‖‖₁ run over all parameters together: wrap the partition, not its parts. Clipping a gradient
    lengthens the step: leave it off. With Adam's momentum and without gradient noise, lr = 1 overshoots (a quadratic
    swings up again), and 0.5 does not. 4 bytes a parameter. Diagnostics: ``fusion/gamma_curr``, ``comp/polyak_inner``,
    ``comp/grad_l1``.

    Source: 2605.19095; the authors' ``adamc_schedulefree_plus_paper.py``, whose base is ``scale_by_adam((0.9, 0.95))``.
    Deviations: the corrected mean is not corrected again at the next update, as the authors' code does when
    ``polyak_beta > 0``; at a gradient of exactly zero lr_t is 0, where theirs is not finite; lr and lr_max have no
    floor of eps.

    Args:
        base: Must read `lr` under its name (``scale_by_learning_rate(1.0)`` at the end of each chain); it sees lr_t
            there, and z as its parameters. It should move entries by about lr, as Adam does.
        lr: A factor; 1 needs no tuning. Live.
        beta: β. Live as ``schedule_free_beta``.
        beta_max: See `schedule_free`.
        anneal: See `schedule_free`.
        c_warmup: See `schedule_free`.
        weight_decay: Acts by lr_t², so 20 to 50 and not 0.1. Live.
        polyak_beta: Above 0: ‖g‖₁ is replaced by its bias-corrected running mean with this decay (live from then on).
        r: See `schedule_free`.
        weight_lr_power: See `schedule_free`.
        average: See `schedule_free`.

    Returns:
        A transform that moves the gradient point to y; it takes a step if `base` does.

    Raises:
        ValueError: `base` moves the gradient point already, or does not read the lr; an option is out of range.
            `update` refuses a context without a loss.

    Example:
        >>> from fusion_compile import optim
        >>> adam = optim.chain(optim.scale_by_adam((0.9, 0.95)), optim.scale_by_learning_rate(0.5))
        >>> optimizer = optim.schedule_free_plus(adam, lr=0.5, weight_decay=20.0)
        >>> optimizer.hyperparameters["lr"]
        0.5
    """
    rate, decay = declare("lr", lr), declare("weight_decay", weight_decay)
    averaging = Averaging(
        declare("schedule_free_beta", beta),
        declare("schedule_free_beta_max", beta_max),
        anneal,
        c_warmup,
        r,
        weight_lr_power,
        average,
    )
    smoothing = None if polyak_beta == 0 else declare("polyak_beta", polyak_beta)
    check_transform("schedule_free_plus(), base,", base)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} already moves the gradient point; schedule_free_plus() cannot wrap it again.")
    check_rates("schedule_free_plus", base, [rate.name])

    def init(params: Tensors) -> ScheduleFreePlusState:
        lr_max, lr_t, inner, norm = (number_like(params, 0.0) for _ in range(4))
        weight_sum = sum_like(params)
        smoothed = {} if smoothing is None else {"norm": norm.clone(), "beta_power": number_like(params, 1.0)}
        base_state, taken = base.init(params), averaging.taken(params)
        return ScheduleFreePlusState(copy(params), lr_max, weight_sum, base_state, taken, lr_t, inner, norm, smoothed)

    def gradient_point(params: Tensors, state: ScheduleFreePlusState, context: Context) -> Tensors:
        return averaging.point(params, state.z, state.taken, context)

    def update(
        updates: Tensors, state: ScheduleFreePlusState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScheduleFreePlusState]:
        if context.loss is None:
            raise ValueError(
                "schedule_free_plus() needs the loss: its step size follows from it. Give update() a context with the "
                "loss at the gradient point, Context(hyperparameters, loss)."
            )
        h = context.hyperparameters
        zero = torch.zeros_like(state.rate)
        norm = total([g.abs() for g in updates.values()], zero)
        inner = total([g * (state.z[k] - params[k]) for k, g in updates.items()], zero)
        inner = averaging.beta_now(state.taken, context) * inner
        size, smoothed = norm, state.smoothed
        if smoothing is not None:
            b = h[smoothing.name]
            smoothed = {
                "norm": b * smoothed["norm"] + (1 - b) * norm,
                "beta_power": smoothed["beta_power"] * b,
            }
            size = smoothed["norm"] / (1 - smoothed["beta_power"])
        ahead = (context.loss.to(norm.dtype) + inner).clamp_min(0)
        lr_t = torch.where(size > 0, h[rate.name] * ahead / (math.sqrt(math.pi / 2) * size), zero)

        y = gradient_point(params, state, context)
        decayed = {k: z - lr_t * lr_t * h[decay.name] * y[k] for k, z in state.z.items()}
        moves, base_state = base.update(updates, state.base, decayed, with_rates(context, {rate.name: lr_t}))
        z = {k: decayed[k] + moves[k] for k in params}
        averaged, lr_max, weight_sum, taken = averaging.move(
            params, z, lr_t, state.lr_max, state.weight_sum, state.taken
        )
        after = ScheduleFreePlusState(z, lr_max, weight_sum, base_state, taken, lr_t, inner, norm, smoothed)
        return averaged, after

    def diagnostics(state: ScheduleFreePlusState) -> dict[str, Tensor]:
        return {"fusion/gamma_curr": state.rate, "comp/polyak_inner": state.inner, "comp/grad_l1": state.norm}

    def rebuild(base: Transform) -> Transform:
        return schedule_free_plus(
            base,
            lr,
            beta,
            beta_max,
            anneal=anneal,
            c_warmup=c_warmup,
            weight_decay=weight_decay,
            polyak_beta=polyak_beta,
            r=r,
            weight_lr_power=weight_lr_power,
            average=average,
        )

    numbers = by_name(rate, *averaging.numbers, decay, *([] if smoothing is None else [smoothing]))
    name = f"schedule_free_plus({base.name})"
    extras = wrap(base, name, numbers, diagnostics=diagnostics, inner=BASE_AT_Z, rebuild=rebuild)
    return Transform(
        init, update, extras._replace(gradient_point=gradient_point, pools="its rate, from sums over all gradients,")
    )
