"""MONA: the gradient with its own acceleration, before momentum and orthogonalization (Meituan, 2605.26842)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare, ones_like_scalar


class MonaState(NamedTuple):
    """`ema`: E, a slow average of the gradient, shaped like the parameters; `started`: 0 before the first update, then
    1, 0-dim."""

    ema: Tensors
    started: Tensor


def mona(beta: Scalar = 0.99, alpha: Scalar | None = None) -> Transform:
    """``G + α A`` with the acceleration ``A ← β A + (1 - β)(G - G_prev)``; put it before the momentum.

    Computed from one buffer: with ``E ← β E + (1 - β) G`` the acceleration is ``A = (1 - β)(G - E_prev)``, so the
    result is ``G + α (1 - β)(G - E_prev)``. `alpha` None is the published rule ``-1 / (2 (1 - β))``, a large negative
    number, which makes it ``G / 2 + E_prev / 2``: half the gradient, half its slow average. The first update has no
    previous gradient, A = 0 and the gradient passes unchanged.

    Any shape, the unit of the gradient. Live: `mona_beta` (0.99; 0.975 was reported for 68B parameters), `mona_alpha`
    where it is given. 4 bytes a parameter.
    Source: the equations and the rule for alpha as three third-party implementations agree on them; the paper's body
    was not readable. Deviations: one buffer instead of the two of those implementations (A and G_prev), equal while
    beta does not change; when it does, E is what is kept.
    """
    b = declare("mona_beta", beta)
    a = None if alpha is None else declare("mona_alpha", alpha)

    def init(params: Tensors) -> MonaState:
        return MonaState(
            {k: torch.zeros_like(p) for k, p in params.items()}, torch.zeros_like(ones_like_scalar(params))
        )

    def update(updates: Tensors, state: MonaState, params: Tensors, context: Context) -> tuple[Tensors, MonaState]:
        beta = context.hyperparameters[b.name]
        weight: Tensor | float = -0.5 if a is None else context.hyperparameters[a.name] * (1 - beta)
        augmented, ema = {}, {}
        for k, g in updates.items():
            previous = torch.where(state.started > 0, state.ema[k], g)  # at the first update E is G: A is zero
            augmented[k] = g + weight * (g - previous)
            ema[k] = previous + (1 - beta) * (g - previous)
        return augmented, MonaState(ema, torch.ones_like(state.started))

    named = [b] if a is None else [b, a]
    return Transform(init, update, {n.name: n.value for n in named}, name="mona")
