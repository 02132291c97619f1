"""Muon's direction: momentum, then its nearest semi-orthogonal matrix (Jordan et al. 2024; ``torch.optim.Muon``)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import SPECTRAL, Context, Scalar, Transform, declare
from fusion_compile.optim.matrix.coefficients import TABLES
from fusion_compile.optim.matrix.newton_schulz import orthogonalize as _orthogonalize


class OrthogonalizeState(NamedTuple):
    """`mu`: momentum, ``[..., m, n]``, in the parameters' dtype."""

    mu: Tensors


def orthogonalize(
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    table: str = "jordan",
    hot_dtype: torch.dtype = torch.bfloat16,
    pairs: bool = False,
) -> Transform:
    """``NS(lerp(g, mu, momentum))`` after ``mu ← lerp(mu, g, 1 - momentum)``; without Nesterov ``NS(mu)``.

    The result has singular values near 1: one unit is one unit of spectral norm. `table`: ``"jordan"``, ``"quintic"``
    or ``"polar_express"``; `hot_dtype`: dtype of the matrix products, ``bfloat16``, ``float16`` or ``float32``.
    `pairs`: compose iterations two by two (see ``matrix.newton_schulz``): the same polynomial, faster on wide and tall
    matrices and more exact on ill-conditioned ones, but in bf16 not bit by bit what ``torch.optim.Muon`` computes.
    Deviations: none from ``torch.optim.Muon`` (exponential-average momentum; norm clamped at 1e-7).
    """
    if table not in TABLES:
        raise ValueError(f"table={table!r} is not known; use one of {', '.join(map(repr, TABLES))}.")
    if hot_dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"hot_dtype={hot_dtype} cannot run Newton-Schulz; use torch.bfloat16, float16 or float32.")
    beta = declare("momentum", momentum)

    def init(params: Tensors) -> OrthogonalizeState:
        return OrthogonalizeState({k: torch.zeros_like(p) for k, p in params.items()})

    def update(
        updates: Tensors, state: OrthogonalizeState, params: Tensors, context: Context
    ) -> tuple[Tensors, OrthogonalizeState]:
        beta_now = context.hyperparameters[beta.name]
        mu = {k: state.mu[k] + (1 - beta_now) * (g - state.mu[k]) for k, g in updates.items()}
        ahead = {k: g + beta_now * (mu[k] - g) for k, g in updates.items()} if nesterov else mu
        directions = {k: _orthogonalize(m, table, hot_dtype, pairs) for k, m in ahead.items()}
        return directions, OrthogonalizeState(mu)

    return Transform(init, update, {beta.name: beta.value}, roles=(SPECTRAL,), name="orthogonalize")
