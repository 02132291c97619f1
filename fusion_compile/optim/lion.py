"""Lion's direction: the sign of a short average of the gradient (Chen et al., 2302.06675)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare


class ScaleByLionState(NamedTuple):
    """`mu`: momentum, shaped like the parameters."""

    mu: Tensors


def scale_by_lion(beta1: Scalar = 0.9, beta2: Scalar = 0.99) -> Transform:
    """``sign(β₁ mu + (1 - β₁) g)``, then ``mu ← β₂ mu + (1 - β₂) g``.

    Every entry is -1, 0 or 1, so lr is the step of one entry: 3 to 10 times smaller than AdamW's, with a decay as many
    times larger. Any shape. 4 bytes a parameter, half of Adam's.
    Source: Algorithm 2 of the paper; ``lion_pytorch.Lion``. Deviations: none.
    """
    b1, b2 = declare("beta1", beta1), declare("beta2", beta2)

    def init(params: Tensors) -> ScaleByLionState:
        return ScaleByLionState({k: torch.zeros_like(p) for k, p in params.items()})

    def update(
        updates: Tensors, state: ScaleByLionState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByLionState]:
        beta1, beta2 = context.hyperparameters[b1.name], context.hyperparameters[b2.name]
        signs = {k: (beta1 * state.mu[k] + (1 - beta1) * g).sign() for k, g in updates.items()}
        mu = {k: beta2 * state.mu[k] + (1 - beta2) * g for k, g in updates.items()}
        return signs, ScaleByLionState(mu)

    return Transform(init, update, {n.name: n.value for n in (b1, b2)}, name="scale_by_lion")
