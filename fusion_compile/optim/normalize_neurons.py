"""NorMuon's second step: every row (neuron) of the orthogonalized update at its own scale (Li et al., 2510.05491)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import SPECTRAL, Context, Scalar, Transform, declare


class NormalizeNeuronsState(NamedTuple):
    """`nu`: running mean of squares of each row, ``[..., r, 1]``."""

    nu: Tensors


SCALES = ("preserve_norm", "match_rms")


def normalize_neurons(beta2: Scalar = 0.95, *, scale: str = "preserve_norm", eps: float = 1e-10) -> Transform:
    """``P = O / (sqrt(nu) + eps)`` with ``nu ← lerp(nu, mean_j O_ij², 1 - β₂)``, then one factor for the whole
    matrix.

    `scale`: ``"preserve_norm"`` brings P back to ‖O‖_F (the authors' code); ``"match_rms"`` to a root mean square of
    0.2, ``0.2 √(rc) P / ‖P‖`` (the paper, and SF-NorMuon), so that one unit of lr moves like one unit of AdamW's.
    Either way the factor cancels the scale of nu, which is why it needs no bias correction.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; use one of {', '.join(map(repr, SCALES))}.")
    b2 = declare("beta2", beta2)

    def init(params: Tensors) -> NormalizeNeuronsState:
        return NormalizeNeuronsState({k: torch.zeros_like(p[..., :1]) for k, p in params.items()})

    def update(
        updates: Tensors, state: NormalizeNeuronsState, params: Tensors, context: Context
    ) -> tuple[Tensors, NormalizeNeuronsState]:
        beta2 = context.hyperparameters[b2.name]
        normalized, nu = {}, {}
        for k, o in updates.items():
            r, c = o.shape[-2:]
            mean_square = o.square().mean(-1, keepdim=True)
            nu[k] = state.nu[k] + (1 - beta2) * (mean_square - state.nu[k])
            per_row = 1 / (nu[k].sqrt() + eps)
            # Both norms follow from the row means: O is read once, and no second pass over the result is needed.
            new_norm = (c * mean_square * per_row.square()).sum(-2, keepdim=True).sqrt()
            if scale == "preserve_norm":
                target = (c * mean_square).sum(-2, keepdim=True).sqrt()
            else:
                target = torch.full_like(new_norm, 0.2 * (r * c) ** 0.5)
            normalized[k] = o * (per_row * (target / (new_norm + eps)))
        return normalized, NormalizeNeuronsState(nu)

    return Transform(init, update, {b2.name: b2.value}, roles=(SPECTRAL,), name="normalize_neurons")
