"""ADOPT's direction: the gradient over the root of the second moment before it, then averaged (2411.02853)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare, declare_betas
from fusion_compile.optim._tree import count_like, update_mean, update_mean_square, zeros_like


class ScaleByAdoptState(NamedTuple):
    """`mu`: the average of normalized gradients; `nu`: the second moment. `taken`: updates taken, 0-dim."""

    mu: Tensors
    nu: Tensors
    taken: Tensor


def scale_by_adopt(betas: tuple[Number, Number] = (0.9, 0.9999), eps: Number = 1e-6) -> Transform:
    """``mu ← lerp(mu, clamp(g / max(√nu, eps), ± t^¼), 1 - β₁)``, and only then ``nu ← β₂ nu + (1 - β₂) g²``.

    The first update only sets ``nu = g²`` and moves nothing. It converges for every β₂, where Adam may not. Any shape.
    8 bytes a parameter.
    Source: 2411.02853 with its clipping; K-Optimizers' ADOPT with a full second moment. Deviations: none.

    Args:
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Lower bound on the root of the second moment. Live.

    Returns:
        A transform without a step. The unit of a following lr is the size of a step of one entry.

    Raises:
        TypeError: `betas` is not a pair.

    Example:
        >>> from fusion_compile import optim
        >>> adopt = optim.chain(optim.scale_by_adopt(), optim.scale_by_learning_rate(1e-3))
        >>> adopt.hyperparameters["beta2"]
        0.9999
    """
    (b1, b2), e = declare_betas(betas), declare("eps", eps)

    def init(params: Tensors) -> ScaleByAdoptState:
        return ScaleByAdoptState(zeros_like(params), zeros_like(params), count_like(params))

    def update(
        updates: Tensors, state: ScaleByAdoptState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdoptState]:
        h = context.hyperparameters
        beta1, beta2, least = h[b1.name], h[b2.name], h[e.name]
        first = state.taken == 0
        room = state.taken.to(beta1.dtype) ** 0.25
        normed = {
            k: torch.minimum(torch.maximum(g / torch.maximum(state.nu[k].sqrt(), least), -room), room)
            for k, g in updates.items()
        }
        mu = {k: torch.where(first, state.mu[k], m) for k, m in update_mean(state.mu, normed, beta1).items()}
        nu = update_mean_square(state.nu, updates, beta2)
        nu = {k: torch.where(first, updates[k] * updates[k], v) for k, v in nu.items()}
        return {k: 1 * m for k, m in mu.items()}, ScaleByAdoptState(mu, nu, state.taken + 1)

    return Transform(init, update, Extras("scale_by_adopt", by_name(b1, b2, e), second_moments=("nu",)))
