"""SOAP: Adam in the eigenbasis of Shampoo's covariances (Vyas et al., 2409.11321), and in KL-Shampoo's (2509.03378)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import SPECTRAL, Context, Scalar, Transform, declare, ones_like_scalar
from fusion_compile.optim.kl_shampoo import (
    KLFactors,
    KLOptions,
    check_options,
    find_bases,
    init_factors,
    refresh_bases,
    update_factors,
)
from fusion_compile.optim.matrix.inverse_roots import eigenbasis, from_basis, power_step, to_basis
from fusion_compile.optim.shampoo import eye_like, mean_factors, periodic, zero_factors


class SoapState(NamedTuple):
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


def soap(
    beta1: Scalar = 0.95,
    beta2: Scalar = 0.95,
    shampoo_beta: Scalar = 0.95,
    *,
    every: int = 10,
    eps: float = 1e-8,
) -> Transform:
    """``(√(1 - β₂ᵗ) / (1 - β₁ᵗ)) Q_L (mu / (√nu + eps)) Q_Rᵀ``, mu and nu Adam's moments of ``Q_Lᵀ G Q_R``.

    Q_L and Q_R are the eigenbases of ``L ← β L + (1 - β) G Gᵀ`` and ``R ← β R + (1 - β) Gᵀ G``, β = `shampoo_beta`.
    They are found by ``eigh`` after the first update, which moves nothing. Every `every` updates their columns, and nu
    alike, are sorted by falling ``diag(Qᵀ L Q)``; then they follow by one power iteration and QR, and mu is rotated
    into the new ones. An update takes its direction first and renews the covariances afterwards.

    Unit of lr: AdamW's, entries of the rotated step are about 1. Memory for one m×n matrix in fp32: 8 + 8 (m/n + n/m)
    bytes a parameter (square: 24; 1:4: 42). Six products of matrices per update.
    Source: nikhilvyas/SOAP ``soap.py``. Deviations: matrices only, every side preconditioned whatever its length
    (``max_precond_dim`` is 10000 there). The published code decays after the step, with lr, and not at update 1.
    """
    b1, b2, b = declare("beta1", beta1), declare("beta2", beta2), declare("shampoo_beta", shampoo_beta)

    def init(params: Tensors) -> SoapState:
        one = ones_like_scalar(params)
        left, right = zero_factors(params, "soap")
        mu, nu = ({k: torch.zeros_like(p) for k, p in params.items()} for _ in range(2))
        left_basis, right_basis = ({k: eye_like(s) for k, s in side.items()} for side in (left, right))
        return SoapState(torch.zeros_like(one), one, one.clone(), mu, nu, left, right, left_basis, right_basis)

    def update(updates: Tensors, state: SoapState, params: Tensors, context: Context) -> tuple[Tensors, SoapState]:
        h, first = context.hyperparameters, state.started == 0
        power1 = state.beta1_power * torch.where(first, 1.0, h[b1.name])
        power2 = state.beta2_power * torch.where(first, 1.0, h[b2.name])
        step_size = (1 - power2).sqrt() / torch.where(first, 1.0, 1 - power1)  # 0 at the first update
        bases = state.left_basis, state.right_basis
        mu, nu = _moments(updates, state.mu, state.nu, bases, h[b1.name], h[b2.name], first)
        directions = _directions(mu, nu, bases, eps)
        left, right = mean_factors(state.left, state.right, updates, h[b.name])
        new = SoapState(torch.ones_like(state.started), power1, power2, mu, nu, left, right, *bases)
        return {k: step_size * d for k, d in directions.items()}, new

    def first_bases(state: SoapState, params: Tensors, context: Context) -> SoapState:
        return state._replace(
            left_basis={k: eigenbasis(s) for k, s in state.left.items()},
            right_basis={k: eigenbasis(s) for k, s in state.right.items()},
        )

    def refresh(state: SoapState, params: Tensors, context: Context) -> SoapState:
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

    return Transform(
        init,
        update,
        {n.name: n.value for n in (b1, b2, b)},
        roles=(SPECTRAL,),
        name="soap",
        periodic=(periodic("soap_bases", every, refresh, first_bases),),
    )


def _sorted(s: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of Q by falling ``diag(Qᵀ S Q)``, and where they were: ``[..., n, n]``, ``[..., n]``."""
    order = (q * (s @ q)).sum(-2).argsort(-1, descending=True)
    return torch.take_along_dim(q, order.unsqueeze(-2), -1), order


class KLSoapState(NamedTuple):
    """`started`: 0-dim, 0 before the first update. `mu`, `nu`: moments of the rotated gradient, shaped like the
    parameters. `factors`: KL-Shampoo's."""

    started: Tensor
    mu: Tensors
    nu: Tensors
    factors: KLFactors


def kl_soap(
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.98,
    shampoo_beta: Scalar = 0.98,
    *,
    every: int = 10,
    eps: float = 1e-8,
    init_factor: float = 0.1,
    max_inverse_root: float | None = 4000.0,
) -> Transform:
    """``Q_a (mu / (√nu + eps)) Q_bᵀ``: `soap` in the eigenbases of `kl_shampoo`'s coupled covariances, without bias
    corrections and without sorting.

    The first update moves nothing. `init_factor`, `max_inverse_root`: see `kl_shampoo`. Unit of lr: AdamW's. Memory for
    one m×n matrix in fp32: 8 + 8 (m/n + n/m) bytes a parameter (square: 24; 1:4: 42). Seven products per update.
    Source: yorkerlin/KL-Methods ``optim/kl_opt.py`` (``KLOpt(using_klsoap=True)``). Deviations: those of `kl_shampoo`.
    """
    b1, b2, b = declare("beta1", beta1), declare("beta2", beta2), declare("shampoo_beta", shampoo_beta)
    options = check_options(KLOptions(init_factor, max_inverse_root))

    def init(params: Tensors) -> KLSoapState:
        mu, nu = ({k: torch.zeros_like(p) for k, p in params.items()} for _ in range(2))
        return KLSoapState(torch.zeros_like(ones_like_scalar(params)), mu, nu, init_factors(params, "kl_soap"))

    def update(updates: Tensors, state: KLSoapState, params: Tensors, context: Context) -> tuple[Tensors, KLSoapState]:
        h, first, f = context.hyperparameters, state.started == 0, state.factors
        bases = f.left_basis, f.right_basis
        mu, nu = _moments(updates, state.mu, state.nu, bases, h[b1.name], h[b2.name], first)
        factors = update_factors(f, updates, h[b.name], first, options)
        return _directions(mu, nu, bases, eps), KLSoapState(torch.ones_like(state.started), mu, nu, factors)

    def first_bases(state: KLSoapState, params: Tensors, context: Context) -> KLSoapState:
        return state._replace(factors=find_bases(state.factors))

    def refresh(state: KLSoapState, params: Tensors, context: Context) -> KLSoapState:
        old, new = state.factors, refresh_bases(state.factors)
        back = {k: from_basis(m, old.left_basis[k], old.right_basis[k]) for k, m in state.mu.items()}
        mu = {k: to_basis(m, new.left_basis[k], new.right_basis[k]) for k, m in back.items()}
        return state._replace(mu=mu, factors=new)

    return Transform(
        init,
        update,
        {n.name: n.value for n in (b1, b2, b)},
        roles=(SPECTRAL,),
        name="kl_soap",
        periodic=(periodic("kl_soap_bases", every, refresh, first_bases),),
    )


# -- Adam in a basis --------------------------------------------------------------------------------------------------


def _moments(
    gradients: Tensors,
    mu: Tensors,
    nu: Tensors,
    bases: tuple[Tensors, Tensors],
    beta1: Tensor,
    beta2: Tensor,
    first: Tensor,
) -> tuple[Tensors, Tensors]:
    """Running means of the rotated gradient and of its square; the first gradient, which has no basis yet, is a 0."""
    rotated = {k: torch.where(first, 0.0, to_basis(g, bases[0][k], bases[1][k])) for k, g in gradients.items()}
    new_mu = {k: mu[k] + (1 - beta1) * (g - mu[k]) for k, g in rotated.items()}
    return new_mu, {k: nu[k] + (1 - beta2) * (g.square() - nu[k]) for k, g in rotated.items()}


def _directions(mu: Tensors, nu: Tensors, bases: tuple[Tensors, Tensors], eps: float) -> Tensors:
    return {k: from_basis(m / (nu[k].sqrt() + eps), bases[0][k], bases[1][k]) for k, m in mu.items()}
