"""Momentum as an exponential average, with or without Nesterov's look-ahead, as ``torch.optim.Muon`` has it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare


class MomentumState(NamedTuple):
    """`mu`: the average, shaped like the parameters."""

    mu: Tensors


def momentum(beta: Scalar = 0.95, *, nesterov: bool = False) -> Transform:
    """``mu ← lerp(mu, g, 1 - beta)``; the update is mu, with `nesterov` ``lerp(g, mu, beta)``.

    Any shape; the gradient's unit; 4 bytes a parameter. The average starts at zero and is not corrected for it: what
    follows is expected not to see the scale (an orthogonalizer, a norm), as in Muon. Deviations from
    ``torch.optim.SGD``: an average, not a sum; the two differ by the factor 1 - beta.
    """
    b = declare("momentum", beta)

    def init(params: Tensors) -> MomentumState:
        return MomentumState({k: torch.zeros_like(p) for k, p in params.items()})

    def update(
        updates: Tensors, state: MomentumState, params: Tensors, context: Context
    ) -> tuple[Tensors, MomentumState]:
        now = context.hyperparameters[b.name]
        mu = {k: state.mu[k] + (1 - now) * (g - state.mu[k]) for k, g in updates.items()}
        # A clone where the update is the state itself: a transform's results are values, not aliases of each other.
        out = {k: g + now * (mu[k] - g) if nesterov else mu[k].clone() for k, g in updates.items()}
        return out, MomentumState(mu)

    return Transform(init, update, {b.name: b.value}, name="momentum")
