"""SOAP: Adam in the eigenbasis of Shampoo's covariances (Vyas et al., 2409.11321)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._adam_in_basis import Bases, Moments, direction, update_moments
from fusion_compile.optim._kronecker import eye_like, mean_factors, periodic, zero_factors
from fusion_compile.optim._ranges import refuse_given
from fusion_compile.optim._transform import (
    SPECTRAL,
    Context,
    Extras,
    Number,
    Transform,
    by_name,
    declare,
    declare_betas,
)
from fusion_compile.optim._tree import map_tensors, number_like, zeros_like
from fusion_compile.optim.matrix.inverse_roots import eigenbasis, from_basis, power_step, to_basis


class ScaleBySoapState(NamedTuple):
    """`started`: 0-dim, 0 before the first update. `beta1_power`, `beta2_power`: β₁ᵗ and β₂ᵗ, 0-dim, t counted from the
    second update. `mu`, `nu`: moments of the rotated gradient, shaped like the parameters. `left`, `right`: running
    covariances ``[..., m, m]`` and ``[..., n, n]``; `left_basis`, `right_basis`: their eigenbases (columns)."""

    started: Tensor
    beta1_power: Tensor
    beta2_power: Tensor
    mu: Tensors
    nu: Tensors
    left: Tensors
    right: Tensors
    left_basis: Tensors
    right_basis: Tensors


def scale_by_soap(
    betas: tuple[Number, Number] = (0.95, 0.95),
    shampoo_beta: Number = 0.95,
    *,
    every: int = 10,
    eps: float = 1e-8,
) -> Transform:
    """``(√(1 - β₂ᵗ) / (1 - β₁ᵗ)) Q_L (mu / (√nu + eps)) Q_Rᵀ``, mu and nu Adam's moments of ``Q_Lᵀ G Q_R``.

    Q_L and Q_R are the eigenbases of ``L ← β L + (1 - β) G Gᵀ`` and ``R ← β R + (1 - β) Gᵀ G``, β = `shampoo_beta`.
    They are found by ``eigh`` after the first update, which moves nothing. Every `every` updates their columns, and nu
    alike, are sorted by falling ``diag(Qᵀ L Q)``; then they follow by one power iteration and QR, and mu is rotated
    into the new ones. An update takes its direction first and renews the covariances afterwards.

    Memory for one m×n matrix in fp32: 8 + 8 (m/n + n/m) bytes a parameter (square: 24; 1:4: 42). Six products of
    matrices per update.
    Source: nikhilvyas/SOAP ``soap.py``. Deviations: matrices only, every side preconditioned whatever its length
    (``max_precond_dim`` is 10000 there). The published code decays after the step, with lr, and not at update 1.

    Args:
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        shampoo_beta: Decay of the covariances. Live.
        every: Updates between two refreshes of the bases (``precondition_frequency``).
        eps: Added to the root of the second moment.

    Returns:
        A transform without a step, for matrices ``[..., m, n]``, role ``"spectral"``. The unit of a following lr is
        AdamW's: entries of the rotated step are about 1.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: `every` is below 1. `init` refuses vectors.

    Example:
        >>> from fusion_compile import optim
        >>> matrices = optim.chain(optim.scale_by_soap(), optim.scale_by_learning_rate(3e-3))
        >>> matrices.descends, optim.scale_by_soap().descends
        (True, False)
    """
    refuse_given("eps", eps, "eps")
    (b1, b2), b = declare_betas(betas), declare("shampoo_beta", shampoo_beta)

    def init(params: Tensors) -> ScaleBySoapState:
        left, right = zero_factors(params, "scale_by_soap")
        started, power1, power2 = (number_like(params, value) for value in (0.0, 1.0, 1.0))
        bases = map_tensors(eye_like, left), map_tensors(eye_like, right)
        return ScaleBySoapState(started, power1, power2, zeros_like(params), zeros_like(params), left, right, *bases)

    def update(
        updates: Tensors, state: ScaleBySoapState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleBySoapState]:
        h, first = context.hyperparameters, state.started == 0
        power1 = state.beta1_power * torch.where(first, 1.0, h[b1.name])
        power2 = state.beta2_power * torch.where(first, 1.0, h[b2.name])
        step_size = (1 - power2).sqrt() / torch.where(first, 1.0, 1 - power1)  # 0 at the first update
        bases = Bases(state.left_basis, state.right_basis)
        moments = update_moments(Moments(state.mu, state.nu), updates, bases, h[b1.name], h[b2.name], first)
        directions = map_tensors(lambda d: step_size * d, direction(moments, bases, eps))
        left, right = mean_factors(state.left, state.right, updates, h[b.name])
        started = torch.ones_like(state.started)
        return directions, ScaleBySoapState(started, power1, power2, *moments, left, right, *bases)

    def first_bases(state: ScaleBySoapState, params: Tensors, context: Context) -> ScaleBySoapState:
        left_basis, right_basis = map_tensors(eigenbasis, state.left), map_tensors(eigenbasis, state.right)
        return state._replace(left_basis=left_basis, right_basis=right_basis)

    def refresh(state: ScaleBySoapState, params: Tensors, context: Context) -> ScaleBySoapState:
        mu, nu, left_basis, right_basis = {}, {}, {}, {}
        for k, v in state.nu.items():
            rows, by_row = _sorted(state.left[k], state.left_basis[k])
            columns, by_column = _sorted(state.right[k], state.right_basis[k])
            v = torch.take_along_dim(v, by_row.unsqueeze(-1), -2)
            nu[k] = torch.take_along_dim(v, by_column.unsqueeze(-2), -1)
            left_basis[k], right_basis[k] = power_step(state.left[k], rows), power_step(state.right[k], columns)
            back = from_basis(state.mu[k], state.left_basis[k], state.right_basis[k])
            mu[k] = to_basis(back, left_basis[k], right_basis[k])
        return state._replace(mu=mu, nu=nu, left_basis=left_basis, right_basis=right_basis)

    own = periodic("soap_bases", every, refresh, first_bases)
    return Transform(
        init, update, Extras("scale_by_soap", by_name(b1, b2, b), (SPECTRAL,), periodic=(own,), second_moments=("nu",))
    )


def _sorted(s: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of Q by falling ``diag(Qᵀ S Q)``, ``[..., n, n]``, and their old positions, ``[..., n]``."""
    order = (q * (s @ q)).sum(-2).argsort(-1, descending=True)
    return torch.take_along_dim(q, order.unsqueeze(-2), -1), order
