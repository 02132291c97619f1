"""Momentum as an exponential average, with or without Nesterov's look-ahead, as in ``torch.optim.Muon``."""

from __future__ import annotations

from typing import NamedTuple

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare
from fusion_compile.optim._tree import copy, lerp, update_mean, zeros_like


class ScaleByMomentumState(NamedTuple):
    """`mu`: the average, shaped like the parameters."""

    mu: Tensors


def scale_by_momentum(beta: Number = 0.95, *, nesterov: bool = False) -> Transform:
    """``mu ← lerp(mu, g, 1 - beta)``; the update is mu, with `nesterov` ``lerp(g, mu, beta)``.

    Any shape. 4 bytes a parameter. The average starts at zero and is not corrected for it: what follows is expected
    to ignore the scale (an orthogonalizer, a norm), as in Muon.
    Source: ``torch.optim.Muon``. Deviations from ``torch.optim.SGD``: an average, not a sum; the two differ by the
    factor 1 - beta.

    Args:
        beta: Decay of the average. Live as ``momentum``.
        nesterov: Look ahead from the new average.

    Returns:
        A transform without a step. The unit is the gradient's.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.chain(optim.scale_by_momentum(0.95, nesterov=True), optim.orthogonalize(None))
        >>> direction.roles
        ('spectral',)
    """
    b = declare("momentum", beta)

    def init(params: Tensors) -> ScaleByMomentumState:
        return ScaleByMomentumState(zeros_like(params))

    def update(
        updates: Tensors, state: ScaleByMomentumState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByMomentumState]:
        now = context.hyperparameters[b.name]
        mu = update_mean(state.mu, updates, now)
        # A copy where the update is the state itself: a transform's results are values, not aliases of each other.
        return lerp(updates, mu, now) if nesterov else copy(mu), ScaleByMomentumState(mu)

    return Transform(init, update, Extras("scale_by_momentum", by_name(b)))
