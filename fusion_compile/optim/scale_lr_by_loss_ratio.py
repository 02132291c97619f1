"""FusionOpt's step size: the learning rate times a running loss over a running mean gradient, within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._step_size import around, check_rates, multiplied
from fusion_compile.optim._transform import (
    Context,
    Facts,
    Scalar,
    State,
    Transform,
    bound,
    declare,
    ones_like_scalar,
)


class ScaleLrByLossRatioState(NamedTuple):
    """0-dim: `loss_ema` and `gnorm_ema`, the two running means; `losses` and `gradients`, how many samples each has;
    `rate`, the first scaled rate of the last update. `base`: the wrapped transform's state."""

    loss_ema: Tensor
    gnorm_ema: Tensor
    losses: Tensor
    gradients: Tensor
    rate: Tensor
    base: State


def scale_lr_by_loss_ratio(
    base: Transform,
    *,
    beta: Scalar = 0.98,
    minimum: Scalar = 0.1,
    maximum: Scalar = 10.0,
    names: Sequence[str] = ("lr",),
) -> Transform:
    """``γ = lr · clamp(L / (G + 1e-12), minimum, maximum)`` in the place of each rate in `names`; L and G are running
    means (decay `beta`) of the loss and of mean |g| over all entries. Each mean begins with its first sample; before
    the first loss the ratio is 1.

    It wraps what should share one ratio, so the whole partition. All that `base` multiplies with the rate, decay too,
    is scaled; Schedule-Free inside weighs its average by the scaled rate. lr: in the unit of `base`. A ratio that stays
    at `maximum` asks for a larger lr, one that stays at `minimum` for a smaller one; for most losses it stays at
    `maximum`, since a loss of 1 over a mean |g| below 0.1 is already 10. No bytes a parameter: five numbers.

    Source: FusionOpt (Taikakim/fusion-optimiser 3e58fe7, ``gamma_t``). Deviations: none in the ratio. It is **not** the
    step size of ScheduleFree+ (`schedule_free_plus`), from which it is drawn: mean |g| where the paper has the sum and
    √(π/2), no ⟨g, z - x⟩, a running mean of the loss where the paper has the loss itself, and bounds.
    """
    return _build(base, beta, minimum, maximum, tuple(names), {})


def _build(
    base: Transform, beta: Scalar, minimum: Scalar, maximum: Scalar, names: tuple[str, ...], facts: Facts
) -> Transform:
    check_rates("scale_lr_by_loss_ratio", base, names)
    b = declare("loss_ratio_beta", beta)
    low, high = declare("loss_ratio_minimum", minimum), declare("loss_ratio_maximum", maximum)

    # Padding of a flat bank must not count in a mean.
    entries = {key: sum(math.prod(m.shape) for m in f.members) for key, f in facts.items()}

    def init(params: Tensors) -> ScaleLrByLossRatioState:
        loss_ema, gnorm_ema, losses, gradients, rate = (torch.zeros_like(ones_like_scalar(params)) for _ in range(5))
        return ScaleLrByLossRatioState(loss_ema, gnorm_ema, losses, gradients, rate, base.init(params))

    def update(
        updates: Tensors, state: ScaleLrByLossRatioState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleLrByLossRatioState]:
        h = context.hyperparameters

        def averaged(mean: Tensor, seen: Tensor, sample: Tensor) -> Tensor:
            return torch.where(seen > 0, h[b.name] * mean + (1 - h[b.name]) * sample, sample)

        total = sum((g.abs().sum(-1).sum() for g in updates.values()), torch.zeros_like(state.rate))
        gnorm = total / sum([entries[key] if key in entries else g.numel() for key, g in updates.items()])
        gnorm_ema = averaged(state.gnorm_ema, state.gradients, gnorm)
        loss_ema, losses = state.loss_ema.clone(), state.losses.clone()
        if context.loss is not None:
            loss_ema, losses = averaged(loss_ema, losses, context.loss.to(gnorm.dtype)), losses + 1
        ratio = torch.minimum(torch.maximum(loss_ema / (gnorm_ema + 1e-12), h[low.name]), h[high.name])
        ratio = torch.where(losses > 0, ratio, torch.ones_like(ratio))
        scaled = multiplied(context, names, ratio)
        updates, base_state = base.update(updates, state.base, params, scaled)
        rate = scaled.hyperparameters[names[0]]
        return updates, ScaleLrByLossRatioState(loss_ema, gnorm_ema, losses, state.gradients + 1, rate, base_state)

    def tells(state: ScaleLrByLossRatioState) -> dict[str, Tensor]:
        return {
            "fusion/gamma_curr": state.rate,
            "fusion/loss_ema": state.loss_ema,
            "fusion/gnorm_ema": state.gnorm_ema,
        }

    def bind(facts: Facts) -> Transform:
        return _build(bound(base, facts), beta, minimum, maximum, names, facts)

    return around(base, init, update, (b, low, high), "scale_lr_by_loss_ratio", tells, bind)
