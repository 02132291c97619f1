"""AdamP's direction: Adam without the part that only makes scale-invariant weights grow (Heo et al., 2006.08217)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    MATRIX,
    Context,
    Number,
    State,
    Transform,
    by_name,
    declare,
)
from fusion_compile.optim.scale_by_adam import scale_by_adam


class ScaleByAdampState(NamedTuple):
    """`base`: Adam's state."""

    base: State


def scale_by_adamp(
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    delta: float = 0.1,
    decay_ratio: float = 0.1,
) -> Transform:
    """Adam's u; where the cosine of g and p is below ``delta / √n``, u without its part along p. Then the decay.

    A matrix is asked row by row first, and then whole; vectors are left to Adam. Where u was projected, the decay is
    multiplied by `decay_ratio`. 8 bytes a parameter.
    Source: 2006.08217, clovaai/AdamP. Deviations: none.

    Args:
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Added to the root of the second moment. Live.
        weight_decay: Per unit of lr; it is part of this direction. Live.
        delta: How near to orthogonal g and p must be.
        decay_ratio: Factor on the decay of projected parameters.

    Returns:
        A transform without a step, for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.scale_by_adamp(weight_decay=0.01), optim.scale_by_learning_rate(1e-3)).roles
        ('matrix', 'scalar')
    """
    base, decay = scale_by_adam(betas, eps), declare("weight_decay", weight_decay)

    def init(params: Tensors) -> ScaleByAdampState:
        return ScaleByAdampState(base.init(params))

    def update(
        updates: Tensors, state: ScaleByAdampState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdampState]:
        directions, inside = base.update(updates, state.base, params, context)
        shrink = context.hyperparameters[decay.name]
        out: Tensors = {}
        for k, u in directions.items():
            p, g = params[k], updates[k]
            if p.ndim < 2:
                out[k] = u + shrink * p
                continue
            by_row, row_fits = _projected(u, p, g, (-1,), delta)
            whole, fits = _projected(u, p, g, (-1, -2), delta)
            chosen = torch.where(row_fits, by_row, torch.where(fits, whole, u))
            ratio = torch.where(row_fits | fits, decay_ratio, 1.0).to(p.dtype)
            out[k] = chosen + shrink * ratio * p
        return out, ScaleByAdampState(inside)

    extras = wrap(base, "scale_by_adamp", by_name(decay))._replace(roles=(MATRIX, ELEMENTWISE))
    return Transform(init, update, extras)


def _projected(u: Tensor, p: Tensor, g: Tensor, over: tuple[int, ...], delta: float) -> tuple[Tensor, Tensor]:
    """`u` without its part along `p`, row by row or whole (the axes `over`), and whether every cosine allows it."""
    entries = 1
    for axis in over:
        entries *= p.shape[axis]
    norm = (p * p).sum(over, keepdim=True).sqrt()
    # torch's cosine_similarity bounds the product of norms from below.
    sizes = (norm * (g * g).sum(over, keepdim=True).sqrt()).clamp(min=1e-8)
    cosine = (p * g).sum(over, keepdim=True).abs() / sizes
    fits = cosine.amax((-1, -2), keepdim=True) < delta / entries**0.5
    unit = p / (norm + 1e-8)
    return u - unit * (unit * u).sum(over, keepdim=True), fits
