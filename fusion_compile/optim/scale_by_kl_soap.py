"""SOAP in the eigenbasis of KL-Shampoo's covariances (Lin et al., 2509.03378)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._adam_in_basis import Bases, Moments, direction, update_moments
from fusion_compile.optim._kl_factors import (
    KLFactors,
    KLOptions,
    check_options,
    find_bases,
    init_factors,
    refresh_bases,
    update_factors,
)
from fusion_compile.optim._kronecker import periodic
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
from fusion_compile.optim.matrix.inverse_roots import from_basis, to_basis


class ScaleByKLSoapState(NamedTuple):
    """`started`: 0-dim, 0 before the first update. `mu`, `nu`: moments of the rotated gradient, shaped like the
    parameters. `factors`: KL-Shampoo's."""

    started: Tensor
    mu: Tensors
    nu: Tensors
    factors: KLFactors


def scale_by_kl_soap(
    betas: tuple[Number, Number] = (0.9, 0.98),
    shampoo_beta: Number = 0.98,
    *,
    every: int = 10,
    eps: float = 1e-8,
    init_factor: float = 0.1,
    max_inverse_root: float | None = 4000.0,
) -> Transform:
    """``Q_a (mu / (√nu + eps)) Q_bᵀ``: `scale_by_soap` in the eigenbases of `scale_by_kl_shampoo`'s covariances.

    There are no bias corrections and there is no sorting. The first update moves nothing. Memory for one m×n matrix in
    fp32: 8 + 8 (m/n + n/m) bytes a parameter (square: 24; 1:4: 42). Seven products per update.
    Source: yorkerlin/KL-Methods ``optim/kl_opt.py`` (``KLOpt(using_klsoap=True)``). Deviations: those of
    `scale_by_kl_shampoo`.

    Args:
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        shampoo_beta: Decay of covariances and eigenvalues. Live.
        every: Updates between two refreshes of the bases.
        eps: Added to the root of the second moment.
        init_factor: See `scale_by_kl_shampoo`.
        max_inverse_root: See `scale_by_kl_shampoo`.

    Returns:
        A transform without a step, for matrices ``[..., m, n]``, role ``"spectral"``. The unit of a following lr is
        AdamW's.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: `every`, `init_factor` or `max_inverse_root` is out of range. `init` refuses vectors.

    Example:
        >>> from fusion_compile import optim
        >>> matrices = optim.chain(optim.scale_by_kl_soap(every=5), optim.scale_by_learning_rate(3e-3))
        >>> matrices.periodic[0].every
        5
    """
    refuse_given("eps", eps, "eps")
    (b1, b2), b = declare_betas(betas), declare("shampoo_beta", shampoo_beta)
    options = check_options(KLOptions(init_factor, max_inverse_root))

    def init(params: Tensors) -> ScaleByKLSoapState:
        factors = init_factors(params, "scale_by_kl_soap")
        return ScaleByKLSoapState(number_like(params, 0.0), zeros_like(params), zeros_like(params), factors)

    def update(
        updates: Tensors, state: ScaleByKLSoapState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByKLSoapState]:
        h, first, f = context.hyperparameters, state.started == 0, state.factors
        bases = Bases(f.left_basis, f.right_basis)
        moments = update_moments(Moments(state.mu, state.nu), updates, bases, h[b1.name], h[b2.name], first)
        factors = update_factors(f, updates, h[b.name], first, options)
        return direction(moments, bases, eps), ScaleByKLSoapState(torch.ones_like(state.started), *moments, factors)

    def first_bases(state: ScaleByKLSoapState, params: Tensors, context: Context) -> ScaleByKLSoapState:
        return state._replace(factors=find_bases(state.factors))

    def refresh(state: ScaleByKLSoapState, params: Tensors, context: Context) -> ScaleByKLSoapState:
        old, new = state.factors, refresh_bases(state.factors)
        back = map_tensors(from_basis, state.mu, old.left_basis, old.right_basis)
        return state._replace(mu=map_tensors(to_basis, back, new.left_basis, new.right_basis), factors=new)

    own = periodic("kl_soap_bases", every, refresh, first_bases)
    return Transform(
        init,
        update,
        Extras("scale_by_kl_soap", by_name(b1, b2, b), (SPECTRAL,), periodic=(own,), second_moments=("nu",)),
    )
