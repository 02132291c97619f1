"""MONA: the gradient with its own acceleration, before momentum and orthogonalization (Meituan, 2605.26842)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare
from fusion_compile.optim._tree import number_like, zeros_like


class ScaleByMonaState(NamedTuple):
    """`ema`: E, a slow average of the gradient, shaped like the parameters; `started`: 0 before the first update, then
    1, 0-dim."""

    ema: Tensors
    started: Tensor


def scale_by_mona(beta: Number = 0.99, alpha: Number | None = None) -> Transform:
    """``G + α A`` with the acceleration ``A ← β A + (1 - β)(G - G_prev)``; put it before the momentum.

    Computed from one buffer: with ``E ← β E + (1 - β) G`` the acceleration is ``A = (1 - β)(G - E_prev)``, so the
    result is ``G + α (1 - β)(G - E_prev)``. The first update has no previous gradient: A = 0, and the gradient passes
    unchanged. Any shape. 4 bytes a parameter.
    Source: the equations and the rule for alpha as three third-party implementations agree on them; the paper's body
    was not readable. Deviations: one buffer instead of the two of those implementations (A and G_prev), equal while
    beta does not change; when it does, E is what is kept.

    Args:
        beta: Decay of the acceleration; 0.975 was reported for 68B parameters. Live as ``mona_beta``.
        alpha: Weight of the acceleration, live as ``mona_alpha``. None is the published rule ``-1 / (2 (1 - β))``, a
            large negative number, which gives ``G / 2 + E_prev / 2``: half the gradient, half its slow average.

    Returns:
        A transform without a step. The unit is the gradient's.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.chain(optim.scale_by_mona(), optim.scale_by_momentum(0.95), optim.orthogonalize(None))
        >>> dict(direction.hyperparameters)
        {'mona_beta': 0.99, 'momentum': 0.95}
    """
    b = declare("mona_beta", beta)
    a = None if alpha is None else declare("mona_alpha", alpha)

    def init(params: Tensors) -> ScaleByMonaState:
        return ScaleByMonaState(zeros_like(params), number_like(params, 0.0))

    def update(
        updates: Tensors, state: ScaleByMonaState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByMonaState]:
        beta = context.hyperparameters[b.name]
        weight: Tensor | float = -0.5 if a is None else context.hyperparameters[a.name] * (1 - beta)
        augmented, ema = {}, {}
        for k, g in updates.items():
            previous = torch.where(state.started > 0, state.ema[k], g)  # at the first update E is G, so A is zero
            augmented[k] = g + weight * (g - previous)
            ema[k] = previous + (1 - beta) * (g - previous)
        return augmented, ScaleByMonaState(ema, torch.ones_like(state.started))

    return Transform(init, update, Extras("scale_by_mona", by_name(*([b] if a is None else [b, a]))))
