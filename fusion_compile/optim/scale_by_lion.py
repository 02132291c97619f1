"""Lion's direction: the sign of a short average of the gradient (Chen et al., 2302.06675)."""

from __future__ import annotations

from typing import NamedTuple

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare_betas
from fusion_compile.optim._tree import weighted_mean, zeros_like


class ScaleByLionState(NamedTuple):
    """`mu`: momentum, shaped like the parameters."""

    mu: Tensors


def scale_by_lion(betas: tuple[Number, Number] = (0.9, 0.99)) -> Transform:
    """``sign(β₁ mu + (1 - β₁) g)``, then ``mu ← β₂ mu + (1 - β₂) g``. Every entry is -1, 0 or 1.

    Any shape. 4 bytes a parameter, half of Adam's.
    Source: Algorithm 2 of the paper; ``lion_pytorch.Lion``. Deviations: none.

    Args:
        betas: β₁ of the step and β₂ of the momentum. Live as ``beta1`` and ``beta2``.

    Returns:
        A transform without a step. A following lr is the step of every entry. It is 3 to 10 times smaller than AdamW's,
        with a decay as many times larger.

    Raises:
        TypeError: `betas` is not a pair.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.scale_by_lion((0.95, 0.98)), optim.scale_by_learning_rate(1e-4))
        >>> optimizer.hyperparameters["beta1"]
        0.95
    """
    b1, b2 = declare_betas(betas)

    def init(params: Tensors) -> ScaleByLionState:
        return ScaleByLionState(zeros_like(params))

    def update(
        updates: Tensors, state: ScaleByLionState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByLionState]:
        beta1, beta2 = context.hyperparameters[b1.name], context.hyperparameters[b2.name]
        signs = {k: t.sign() for k, t in weighted_mean(state.mu, updates, beta1).items()}
        return signs, ScaleByLionState(weighted_mean(state.mu, updates, beta2))

    return Transform(init, update, Extras("scale_by_lion", by_name(b1, b2)))
