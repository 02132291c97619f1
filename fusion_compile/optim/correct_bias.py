"""Adam's correction of an average that started at zero, as a part of its own."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare
from fusion_compile.optim._tree import number_like


class CorrectBiasState(NamedTuple):
    """`beta1_power`: β₁ᵗ, 0-dim: the product of the betas that were used."""

    beta1_power: Tensor


def correct_bias(beta: Number = 0.9) -> Transform:
    """``u / (1 - β₁ᵗ)``, t counted from 1. Behind a clip it corrects what the clip left.

    Any shape; keeps one number. Source: 1412.6980. Deviations: none.

    Args:
        beta: β₁ of the average. Live as ``beta1``, the number that the average reads.

    Returns:
        A transform without a step.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.chain(optim.scale_by_momentum(optim.Named("beta1", 0.9)), optim.correct_bias(0.9))
        >>> dict(direction.hyperparameters)
        {'beta1': 0.9}
    """
    b1 = declare("beta1", beta)

    def init(params: Tensors) -> CorrectBiasState:
        return CorrectBiasState(number_like(params, 1.0))

    def update(
        updates: Tensors, state: CorrectBiasState, params: Tensors, context: Context
    ) -> tuple[Tensors, CorrectBiasState]:
        power = state.beta1_power * context.hyperparameters[b1.name]
        factor = 1 / (1 - power)
        return {k: factor * u for k, u in updates.items()}, CorrectBiasState(power)

    return Transform(init, update, Extras("correct_bias", by_name(b1)))
