"""KL-Shampoo: each side's covariance measured in the metric of the other side (Lin et al., 2509.03378)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    SPECTRAL,
    Context,
    Facts,
    Scalar,
    State,
    Transform,
    bound,
    declare,
    merge_hyperparameters,
    ones_like_scalar,
)
from fusion_compile.optim.matrix.inverse_roots import eigenbasis, from_basis, power_step, to_basis
from fusion_compile.optim.shampoo import around, base_or_mean, eye_like, gain_of, periodic, zero_factors


class KLFactors(NamedTuple):
    """Of matrices ``[..., m, n]``: `left` ``[..., m, m]`` and `right` ``[..., n, n]`` covariances, `left_basis` and
    `right_basis` their eigenbases (columns), `left_root` ``[..., m]`` and `right_root` ``[..., n]`` the inverse square
    roots of their eigenvalues."""

    left: Tensors
    right: Tensors
    left_basis: Tensors
    right_basis: Tensors
    left_root: Tensors
    right_root: Tensors


class KLShampooState(NamedTuple):
    """`started`: 0-dim, 0 before the first update and 1 after it. `base`: state of what maps gradient to update.
    `gain`: 0-dim, norm of the preconditioned update over that of the incoming one, all matrices together."""

    started: Tensor
    base: State
    factors: KLFactors
    gain: Tensor


class KLOptions(NamedTuple):
    """The numbers of the coupled factors that are not live; `kl_shampoo` explains them."""

    init_factor: float = 0.1
    max_inverse_root: float | None = 4000.0


def kl_shampoo(
    beta1: Scalar = 0.9,
    shampoo_beta: Scalar = 0.98,
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
    needed. With ``S_a = Q_a diag(λ_a) Q_aᵀ``, eigenvalues follow every update in the basis at hand, ``λ_a,i ←
    lerp(λ_a,i, mean_j (Q_aᵀ G Q_b)_ij² / λ_b,j, 1 - β)``. The basis follows every `every` updates by one power
    iteration and QR; it is found once, after the first update, by ``eigh``. An update takes its direction first, from
    the factors of the gradients before it, so the first one moves nothing.

    U comes from `base`, a transform that is given the gradient (momentum, MONA, ...), while the factors are built from
    the gradient itself; None, as published: ``U ← lerp(U, G, 1 - beta1)`` from the second gradient on, without bias
    correction. What follows in the chain continues on the result: the learning rate, or an orthogonalization.

    `eps`: the scale ``E_ij = 1/√(λ_a,i λ_b,j)`` becomes ``E / (1 + eps E)``. `init_factor`: every eigenvalue at first.
    `max_inverse_root`: 1/√λ on a side of length d is at most ``max(10, min(d, max_inverse_root))``; None: no bound.

    Unit of lr: AdamW's; a whitened gradient has entries of mean square 1. Memory for one m×n matrix in fp32: 8 (m/n +
    n/m) bytes a parameter, and 4 for U when `base` is None (square: 20; 1:4: 38). Nine products of matrices per update.
    Source: yorkerlin/KL-Methods ``optim/kl_opt.py`` (``KLOpt``). Deviations: computed in the parameters' dtype (there
    in bf16 by default); matrices only. A given `base` does see the first gradient. The published code decays
    after the step, ``p ← (1 - lr·wd)(p - lr D)``, and not at update 1; a decay in the chain acts on p alone, which
    differs by ``lr²·wd·D``.
    """
    inner, b = base_or_mean("kl_shampoo", base, beta1), declare("shampoo_beta", shampoo_beta)
    options = check_options(KLOptions(init_factor, max_inverse_root))

    def init(params: Tensors) -> KLShampooState:
        zero = torch.zeros_like(ones_like_scalar(params))
        return KLShampooState(zero, inner.init(params), init_factors(params, "kl_shampoo"), zero.clone())

    def update(
        updates: Tensors, state: KLShampooState, params: Tensors, context: Context
    ) -> tuple[Tensors, KLShampooState]:
        first, f = state.started == 0, state.factors
        # The published mean starts at the second gradient: its first is a zero.
        seen = updates if base is not None else {k: torch.where(first, 0.0, g) for k, g in updates.items()}
        incoming, base_state = inner.update(seen, state.base, params, context)
        directions = {}
        for k, u in incoming.items():
            scale = f.left_root[k].unsqueeze(-1) * f.right_root[k].unsqueeze(-2)
            scaled = to_basis(u, f.left_basis[k], f.right_basis[k]) * (scale / (1 + eps * scale))
            directions[k] = torch.where(first, 0.0, from_basis(scaled, f.left_basis[k], f.right_basis[k]))
        factors = update_factors(f, updates, context.hyperparameters[b.name], first, options)
        gain = gain_of(directions, incoming)
        return directions, KLShampooState(torch.ones_like(state.started), base_state, factors, gain)

    def refresh(state: KLShampooState, params: Tensors, context: Context) -> KLShampooState:
        return state._replace(factors=refresh_bases(state.factors))

    def first_bases(state: KLShampooState, params: Tensors, context: Context) -> KLShampooState:
        return state._replace(factors=find_bases(state.factors))

    def bind(facts: Facts) -> Transform:
        assert base is not None
        known = bound(base, facts)
        return kl_shampoo(beta1, shampoo_beta, base=known, every=every, eps=eps, **options._asdict())

    return Transform(
        init,
        update,
        merge_hyperparameters(inner.hyperparameters, {b.name: b.value}),
        tuple(dict.fromkeys((SPECTRAL, *inner.roles))),
        name="kl_shampoo" if base is None else f"kl_shampoo({base.name})",
        bind=None if base is None or base.bind is None else bind,
        **around(inner, periodic("kl_shampoo_bases", every, refresh, first_bases)),
    )


# -- the coupled factors ----------------------------------------------------------------------------------------------


def check_options(options: KLOptions) -> KLOptions:
    """`options`; ValueError for those that leave nothing to divide by."""
    if not options.init_factor > 0:
        raise ValueError(f"init_factor={options.init_factor!r} is the first eigenvalue; use a number above 0.")
    if options.max_inverse_root is not None and not options.max_inverse_root > 0:
        raise ValueError(f"max_inverse_root={options.max_inverse_root!r} bounds 1/√λ; use a number above 0, or None.")
    return options


def init_factors(params: Tensors, what: str) -> KLFactors:
    """Covariances 0, bases and roots 1: with them the first gradient is measured by itself alone, G Gᵀ / n."""
    left, right = zero_factors(params, what)
    left_basis, right_basis = ({k: eye_like(s) for k, s in side.items()} for side in (left, right))
    left_root, right_root = ({k: torch.ones_like(s[..., 0]) for k, s in side.items()} for side in (left, right))
    return KLFactors(left, right, left_basis, right_basis, left_root, right_root)


def update_factors(f: KLFactors, gradients: Tensors, beta: Tensor, first: Tensor, options: KLOptions) -> KLFactors:
    """Covariances and eigenvalues after these gradients, in the bases at hand. `first`: 0-dim, whether they are the
    first, after which all eigenvalues are `init_factor`."""
    left, right, left_root, right_root = {}, {}, {}, {}
    for k, g in gradients.items():
        m, n = g.shape[-2:]
        per_row, per_column = f.left_root[k].unsqueeze(-1), f.right_root[k].unsqueeze(-2)
        g_right, g_left = g @ f.right_basis[k], f.left_basis[k].mT @ g
        a, b = g_right * per_column, g_left * per_row
        left[k] = beta * f.left[k] + ((1 - beta) / n) * (a @ a.mT)
        right[k] = beta * f.right[k] + ((1 - beta) / m) * (b.mT @ b)
        rotated = g_left @ f.right_basis[k]
        row_mean = (rotated * per_column).square().mean(-1)
        column_mean = (rotated * per_row).square().mean(-2)
        left_root[k] = _new_root(f.left_root[k], row_mean, beta, first, options)
        right_root[k] = _new_root(f.right_root[k], column_mean, beta, first, options)
    return f._replace(left=left, right=right, left_root=left_root, right_root=right_root)


def _new_root(root: Tensor, measured: Tensor, beta: Tensor, first: Tensor, options: KLOptions) -> Tensor:
    """1/√λ of ``λ ← lerp(λ, measured, 1 - beta)``; 0 where λ is 0, which is what an infinite variance would give."""
    eigenvalue = _finite(1 / root.square())
    new = _finite((eigenvalue + (1 - beta) * (measured - eigenvalue)).rsqrt())
    if options.max_inverse_root is not None:
        new = new.clamp(max=max(10.0, min(float(root.size(-1)), options.max_inverse_root)))
    return torch.where(first, options.init_factor**-0.5, new)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def refresh_bases(f: KLFactors) -> KLFactors:
    """Both bases by one power iteration and QR; the eigenvalues stay."""
    return f._replace(
        left_basis={k: power_step(s, f.left_basis[k]) for k, s in f.left.items()},
        right_basis={k: power_step(s, f.right_basis[k]) for k, s in f.right.items()},
    )


def find_bases(f: KLFactors) -> KLFactors:
    """Both bases by an eigendecomposition; the eigenvalues stay."""
    return f._replace(
        left_basis={k: eigenbasis(s) for k, s in f.left.items()},
        right_basis={k: eigenbasis(s) for k, s in f.right.items()},
    )
