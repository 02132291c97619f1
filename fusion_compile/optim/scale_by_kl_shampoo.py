"""KL-Shampoo: each side's covariance measured in the metric of the other side (Lin et al., 2509.03378)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._kl_factors import (
    KLFactors,
    KLOptions,
    check_options,
    find_bases,
    init_factors,
    refresh_bases,
    update_factors,
)
from fusion_compile.optim._kronecker import base_or_mean, gain_of, periodic, preconditioner
from fusion_compile.optim._ranges import refuse_given
from fusion_compile.optim._transform import Context, Number, State, Transform, by_name, declare
from fusion_compile.optim._tree import map_tensors, number_like
from fusion_compile.optim.matrix.inverse_roots import from_basis, to_basis


class ScaleByKLShampooState(NamedTuple):
    """`started`: 0-dim, 0 before the first update and 1 after it. `base`: state of the map from gradient to update.
    `gain`: 0-dim, norm of the preconditioned update over that of the incoming one, all matrices together."""

    started: Tensor
    base: State
    factors: KLFactors
    gain: Tensor


def scale_by_kl_shampoo(
    beta: Number = 0.9,
    shampoo_beta: Number = 0.98,
    *,
    base: Transform | None = None,
    every: int = 10,
    eps: float = 1e-8,
    init_factor: float = 0.1,
    max_inverse_root: float | None = 4000.0,
) -> Transform:
    """``S_a^(-1/2) U S_b^(-1/2)``, U an update, S_a and S_b covariances of the gradient's rows and columns.

    ``S_a ← β S_a + (1 - β) G S_b⁻¹ Gᵀ / n`` and ``S_b ← β S_b + (1 - β) Gᵀ S_a⁻¹ G / m`` for G ``[m, n]``, β =
    `shampoo_beta`: each factor is measured with the other divided out, so both exponents are -1/2 and no grafting is
    needed. With ``S_a = Q_a diag(λ_a) Q_aᵀ``, eigenvalues follow every update in the present basis, ``λ_a,i ←
    lerp(λ_a,i, mean_j (Q_aᵀ G Q_b)_ij² / λ_b,j, 1 - β)``. The basis follows every `every` updates by one power
    iteration and QR; it is found once, after the first update, by ``eigh``. An update takes its direction first, from
    the factors of the gradients before it, so the first one moves nothing.

    Memory for one m×n matrix in fp32: 8 (m/n + n/m) bytes a parameter, and 4 for U when `base` is None (square: 20;
    1:4: 38). Nine products of matrices per update. Diagnostic: ``comp/shampoo_gain``.
    Source: yorkerlin/KL-Methods ``optim/kl_opt.py`` (``KLOpt``). Deviations: computed in the parameters' dtype (there
    in bf16 by default); matrices only. A given `base` sees the first gradient. The published code decays after the
    step, ``p ← (1 - lr·wd)(p - lr D)``, and not at update 1; a decay in the chain acts on p alone, which differs by
    ``lr²·wd·D``.

    Args:
        beta: Decay of ``U ← lerp(U, G, 1 - beta)`` if `base` is None: from the second gradient on, without bias
            correction, as published. Live as ``beta1``.
        shampoo_beta: Decay of covariances and eigenvalues. Live.
        base: A transform that maps the gradient to U (momentum, MONA, …); the factors are built from the gradient
            itself.
        every: Updates between two refreshes of the bases.
        eps: The scale ``E_ij = 1/√(λ_a,i λ_b,j)`` becomes ``E / (1 + eps E)``.
        init_factor: Every eigenvalue after the first update.
        max_inverse_root: 1/√λ on a side of length d is at most ``max(10, min(d, max_inverse_root))``; None: no bound.

    Returns:
        A transform for matrices ``[..., m, n]``, role ``"spectral"``; it takes a step if `base` does. The unit of
        lr is AdamW's: a whitened gradient has entries of mean square 1.

    Raises:
        ValueError: `every`, `init_factor` or `max_inverse_root` is out of range; `base` moves the gradient point.
            `init` refuses vectors.

    Example:
        >>> from fusion_compile import optim
        >>> momentum = optim.scale_by_momentum(0.95)
        >>> direction = optim.chain(optim.scale_by_kl_shampoo(base=momentum), optim.orthogonalize(None))
        >>> direction.hyperparameters["shampoo_beta"]
        0.98
    """
    refuse_given("eps", eps, "eps")
    inner, b = base_or_mean("scale_by_kl_shampoo", base, beta), declare("shampoo_beta", shampoo_beta)
    options = check_options(KLOptions(init_factor, max_inverse_root))

    def init(params: Tensors) -> ScaleByKLShampooState:
        factors = init_factors(params, "scale_by_kl_shampoo")
        return ScaleByKLShampooState(number_like(params, 0.0), inner.init(params), factors, number_like(params, 0.0))

    def update(
        updates: Tensors, state: ScaleByKLShampooState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByKLShampooState]:
        first, f = state.started == 0, state.factors
        # The published mean starts at the second gradient: its first is a zero.
        seen = updates if base is not None else map_tensors(lambda g: torch.where(first, 0.0, g), updates)
        incoming, base_state = inner.update(seen, state.base, params, context)
        directions = {}
        for k, u in incoming.items():
            scale = f.left_root[k].unsqueeze(-1) * f.right_root[k].unsqueeze(-2)
            scaled = to_basis(u, f.left_basis[k], f.right_basis[k]) * (scale / (1 + eps * scale))
            directions[k] = torch.where(first, 0.0, from_basis(scaled, f.left_basis[k], f.right_basis[k]))
        factors = update_factors(f, updates, context.hyperparameters[b.name], first, options)
        gain = gain_of(directions, incoming)
        return directions, ScaleByKLShampooState(torch.ones_like(state.started), base_state, factors, gain)

    def refresh(state: ScaleByKLShampooState, params: Tensors, context: Context) -> ScaleByKLShampooState:
        return state._replace(factors=refresh_bases(state.factors))

    def first_bases(state: ScaleByKLShampooState, params: Tensors, context: Context) -> ScaleByKLShampooState:
        return state._replace(factors=find_bases(state.factors))

    def rebuild(base: Transform) -> Transform:
        return scale_by_kl_shampoo(beta, shampoo_beta, base=base, every=every, eps=eps, **options._asdict())

    own = periodic("kl_shampoo_bases", every, refresh, first_bases)
    return Transform(init, update, preconditioner("scale_by_kl_shampoo", base, inner, by_name(b), own, rebuild))
