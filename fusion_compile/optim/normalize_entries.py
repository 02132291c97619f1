"""AdaMuon's second moment of an orthogonalized update, entry by entry (Si, Li & Lin, 2507.11005)."""

from __future__ import annotations

import math
from typing import NamedTuple

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import SPECTRAL, Context, Extras, Number, Transform, by_name, declare
from fusion_compile.optim._tree import update_mean_square, zeros_like


class NormalizeEntriesState(NamedTuple):
    """`nu`: running mean of squares of each entry, shaped like the parameters."""

    nu: Tensors


def normalize_entries(beta: Number = 0.95, *, rms: float = 0.2, eps: float = 1e-8) -> Transform:
    """``u = O / (√nu + eps)`` with ``nu ← β₂ nu + (1 - β₂) O²``, scaled so that its root mean square is `rms`.

    Without bias correction, which the scale undoes. Matrices ``[..., m, n]``. 4 bytes a parameter.
    Source: 2507.11005 and its code. Deviations: nu is in the state's dtype, there bf16.

    Args:
        beta: β₂. Live as ``beta2``.
        rms: Root mean square of each result; 0.2 is AdamW's.
        eps: Added to roots and norms.

    Returns:
        A transform without a step, for the role ``"spectral"``. The unit of a following lr is AdamW's.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.orthogonalize(0.95), optim.normalize_entries()).roles
        ('spectral',)
    """
    b2 = declare("beta2", beta)

    def init(params: Tensors) -> NormalizeEntriesState:
        return NormalizeEntriesState(zeros_like(params))

    def update(
        updates: Tensors, state: NormalizeEntriesState, params: Tensors, context: Context
    ) -> tuple[Tensors, NormalizeEntriesState]:
        nu = update_mean_square(state.nu, updates, context.hyperparameters[b2.name])
        scaled: Tensors = {}
        for k, o in updates.items():
            u = o / (nu[k].sqrt() + eps)
            norm = (u * u).sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt()
            scaled[k] = u * (rms * math.sqrt(o.shape[-1] * o.shape[-2]) / (norm + eps))
        return scaled, NormalizeEntriesState(nu)

    return Transform(init, update, Extras("normalize_entries", by_name(b2), (SPECTRAL,), second_moments=("nu",)))
