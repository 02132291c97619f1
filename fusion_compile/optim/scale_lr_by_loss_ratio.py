"""FusionOpt's step size: the learning rate times a running loss over a running mean gradient, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._step_size import check_rates, multiplied
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import (
    BankInfos,
    Context,
    Number,
    State,
    Transform,
    bound,
    by_name,
    declare,
)
from fusion_compile.optim._tree import count_like, number_like


class ScaleLrByLossRatioState(NamedTuple):
    """0-dim: `loss_ema` and `gnorm_ema`, the two running means; `losses` and `gradients`, their numbers of samples;
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
    beta: Number = 0.98,
    minimum: Number = 0.1,
    maximum: Number = 10.0,
    names: Sequence[str] = ("lr",),
) -> Transform:
    """Replace each rate in `names` by ``γ = lr · clamp(L / (G + 1e-12), minimum, maximum)``.

    L and G are running means of the loss and of mean |g| over all entries. Each mean begins with its first sample;
    before the first loss the ratio is 1. Everything that `base` multiplies by the rate is scaled, including decay;
    Schedule-Free inside weighs its average by the scaled rate. Five numbers, no bytes a parameter. Diagnostics:
    ``fusion/gamma_curr``, ``fusion/loss_ema``, ``fusion/gnorm_ema``.

    Source: FusionOpt (Taikakim/fusion-optimiser 3e58fe7, ``gamma_t``). Deviations: none in the ratio. It is **not** the
    step size of ScheduleFree+ (`schedule_free_plus`), from which it is drawn: mean |g| instead of the paper's sum and
    √(π/2), no ⟨g, z - x⟩, a running mean of the loss instead of the loss itself, and bounds.

    Args:
        base: Everything that should share one ratio, so the whole partition.
        beta: Decay of both means. Live as ``loss_ratio_beta``.
        minimum: Smallest ratio. Live as ``loss_ratio_minimum``.
        maximum: Largest ratio. Live as ``loss_ratio_maximum``. For most losses the ratio stays here, because a loss of
            1 over a mean |g| below 0.1 is already 10. If it does, increase the lr; if it stays at `minimum`, decrease
            the lr.
        names: Hyperparameters of `base` that are scaled; lr in the unit of `base`.

    Returns:
        `base` with scaled rates; it takes a step if `base` does.

    Raises:
        ValueError: `base` does not read one of `names`.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.scale_lr_by_loss_ratio(optim.adamw(1e-4))
        >>> optimizer.hyperparameters["loss_ratio_maximum"]
        10.0
    """
    return _build(base, beta, minimum, maximum, tuple(names), {})


def _build(
    base: Transform, beta: Number, minimum: Number, maximum: Number, names: tuple[str, ...], infos: BankInfos
) -> Transform:
    check_rates("scale_lr_by_loss_ratio", base, names)
    b = declare("loss_ratio_beta", beta)
    low, high = declare("loss_ratio_minimum", minimum), declare("loss_ratio_maximum", maximum)

    # Padding of a flat bank must not count in a mean.
    entries = {key: sum(place.numel for place in info.places) for key, info in infos.items()}

    def init(params: Tensors) -> ScaleLrByLossRatioState:
        loss_ema, gnorm_ema, rate = (number_like(params, 0.0) for _ in range(3))
        losses, gradients = count_like(params), count_like(params)
        return ScaleLrByLossRatioState(loss_ema, gnorm_ema, losses, gradients, rate, base.init(params))

    def update(
        updates: Tensors, state: ScaleLrByLossRatioState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleLrByLossRatioState]:
        h = context.hyperparameters

        def averaged(mean: Tensor, seen: Tensor, sample: Tensor) -> Tensor:
            return torch.where(seen > 0, h[b.name] * mean + (1 - h[b.name]) * sample, sample)

        absolute = total([g.abs() for g in updates.values()], torch.zeros_like(state.rate))
        gnorm = absolute / sum([entries[key] if key in entries else g.numel() for key, g in updates.items()])
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

    def diagnostics(state: ScaleLrByLossRatioState) -> dict[str, Tensor]:
        return {
            "fusion/gamma_curr": state.rate,
            "fusion/loss_ema": state.loss_ema,
            "fusion/gnorm_ema": state.gnorm_ema,
        }

    def bind(infos: BankInfos) -> Transform:
        return _build(bound(base, infos), beta, minimum, maximum, names, infos)

    name = f"scale_lr_by_loss_ratio({base.name})"
    extras = wrap(base, name, by_name(b, low, high), diagnostics=diagnostics)
    return Transform(init, update, extras._replace(bind=bind, pools="its rate, from the mean of all gradients,"))
