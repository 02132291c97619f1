"""Momentum behind the learning rate: an average of steps that are scaled already (Adafactor's order)."""

from __future__ import annotations

from typing import NamedTuple

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Named, Number, Transform, by_name, declare, stateless
from fusion_compile.optim._tree import update_mean, zeros_like


class AverageStepsState(NamedTuple):
    """`mu`: the average of steps, shaped like the parameters, uphill; empty for β₁ = 0."""

    mu: Tensors


def keeps_average(beta: Number) -> bool:
    """Whether `beta` needs an average: it is not the number 0."""
    return isinstance(beta, Named) or callable(beta) or beta != 0


def average_steps(
    lr: Number = 1e-3, beta: Number = 0.9, weight_decay: Number = 0.0, *, factor: float = 1.0
) -> Transform:
    """``mu ← lerp(mu, lr u, 1 - β₁)``; the result is ``mu + lr · weight_decay · params``, still uphill.

    A change of lr reaches the weights over 1 / (1 - β₁) steps; the decay follows at once. `descend` behind it takes the
    step. 4 bytes a parameter, none where `beta` is the number 0.
    Source: Adafactor's order of momentum, as in K-Optimizers' Adakaon. Deviations: none.

    Args:
        lr: Multiplies each direction before it is averaged. Live as ``lr``.
        beta: β₁, live as ``beta1``. The number 0 keeps no average at all, and has no name.
        weight_decay: Per unit of lr. Live.
        factor: Multiplies lr for the direction and not for the decay (0.2 of Muon's root mean square).

    Returns:
        A transform without a step; its results hold the lr.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.scale_by_factored_rms(), optim.average_steps(1e-3), optim.descend())
        >>> optimizer.descends
        True
    """
    rate, decay = declare("lr", lr), declare("weight_decay", weight_decay)
    keeps = keeps_average(beta)
    b1 = declare("beta1", beta)

    def init(params: Tensors) -> AverageStepsState:
        return AverageStepsState(zeros_like(params) if keeps else {})

    def update(
        updates: Tensors, state: AverageStepsState, params: Tensors, context: Context
    ) -> tuple[Tensors, AverageStepsState]:
        h = context.hyperparameters
        step = h[rate.name]
        taken = {k: (factor * step if factor != 1 else step) * u for k, u in updates.items()}
        mu = update_mean(state.mu, taken, h[b1.name]) if keeps else taken
        shrink = step * h[decay.name]
        return {k: m + shrink * params[k] for k, m in mu.items()}, AverageStepsState(mu if keeps else {})

    return Transform(init, update, Extras("average_steps", by_name(rate, *([b1] if keeps else []), decay)))


def descend() -> Transform:
    """Multiply by -1: the step of a chain whose directions hold the learning rate already.

    Returns:
        A transform that takes a step. Keeps nothing.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.scale_by_factored_rms(), optim.average_steps(1e-3), optim.descend()).descends
        True
    """

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        return {k: -u for k, u in updates.items()}

    return stateless(update, {}, "descend", descends=True)
