"""AdaPNM's direction: positive-negative momentum over the root of a factored second moment (Xie et al., 2103.17182)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    MATRIX,
    Context,
    Extras,
    Number,
    Transform,
    by_name,
    declare,
    declare_betas,
)
from fusion_compile.optim._tree import number_like, zeros_like
from fusion_compile.optim.scale_by_factored_rms import inverse_root


class ScaleByAdapnmState(NamedTuple):
    """`mu`: the average that the last gradient went into; `mu_before`: the other one. `row`, `column`, `nu`: the second
    moment, as in `scale_by_factored_rms`; `largest`: with AMSGrad the largest `nu`. `beta2_power`: β₂ᵗ, 0-dim."""

    mu: Tensors
    mu_before: Tensors
    row: Tensors
    column: Tensors
    nu: Tensors
    largest: Tensors
    beta2_power: Tensor


def scale_by_adapnm(
    betas: tuple[Number, Number] = (0.8, 0.999),
    beta0: Number = 0.5,
    *,
    eps: float | None = None,
    factored: bool = True,
    amsgrad: bool = False,
) -> Transform:
    """``((1 + β₀) new - β₀ mu) / √((1 + β₀)² + β₀²) · √(1 - β₂ᵗ) / √v`` with ``new = β₁² mu_before + (1 - β₁²) g``.

    The two averages take turns, every other gradient in each. Their difference keeps the gradient's mean and turns its
    noise up. v is factored on matrices. 8 bytes a parameter, 4 (m + n) a matrix, and 4 an entry of the rest.
    Source: 2103.17182, with K-Optimizers' second moment. Deviations: eps, see there. The authors' AdaPNM is
    ``betas=(0.9, 0.999)``, ``beta0=1``, ``eps=1e-8``, ``factored=False``, ``amsgrad=True``.

    Args:
        betas: β₁, by whose square each average decays every other step, and β₂. Live as ``beta1`` and ``beta2``.
        beta0: β₀, how much the noise is turned up. Live as ``pnm_beta0``.
        eps: None: 1e-30 is added to squares, and the direction does not depend on the gradient's size. A number is
            added to the squares of matrices and to the roots of the rest, as in the source: its 1e-8 is a floor of 1e-4
            for gradients, under which matrices move in proportion to them.
        factored: False keeps a second moment of every entry, 4 bytes a parameter, and adds eps where the authors do,
            to the corrected root.
        amsgrad: Whether the largest second moment so far counts, where it is kept by entry; 4 bytes an entry more.

    Returns:
        A transform without a step, for the roles ``"matrix"`` and ``"scalar"``; for any shape if not factored.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: `eps` is negative.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.chain(optim.scale_by_adapnm(), optim.clip_update_rms(), optim.correct_bias(0.8))
        >>> direction.hyperparameters["pnm_beta0"]
        0.5
    """
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps={eps!r} is added to squares; give 0 or more, or None.")
    (b1, b2), b0 = declare_betas(betas), declare("pnm_beta0", beta0)
    in_square = 1e-30 if eps is None else eps

    def factors(t: Tensor) -> bool:
        return factored and t.ndim > 1

    def init(params: Tensors) -> ScaleByAdapnmState:
        matrices = {k: p for k, p in params.items() if factors(p)}
        rest = {k: p for k, p in params.items() if not factors(p)}
        return ScaleByAdapnmState(
            zeros_like(params),
            zeros_like(params),
            {k: p.new_zeros((*p.shape[:-1], 1)) for k, p in matrices.items()},
            {k: p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) for k, p in matrices.items()},
            zeros_like(rest),
            zeros_like(rest) if amsgrad else {},
            number_like(params, 1.0),
        )

    def update(
        updates: Tensors, state: ScaleByAdapnmState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdapnmState]:
        h = context.hyperparameters
        beta1, beta2, beta0 = h[b1.name], h[b2.name], h[b0.name]
        slow = beta1 * beta1
        norm = ((1 + beta0) * (1 + beta0) + beta0 * beta0).sqrt()
        power2 = state.beta2_power * beta2
        correction = (1 - power2).sqrt()
        mu = {k: slow * state.mu_before[k] + (1 - slow) * g for k, g in updates.items()}
        scaled: Tensors = {}
        row: Tensors = {}
        column: Tensors = {}
        nu: Tensors = {}
        largest: Tensors = {}
        for k, g in updates.items():
            plain = ((1 + beta0) * mu[k] - beta0 * state.mu[k]) / norm
            n = plain * correction
            if factors(g):
                square = g * g + in_square
                row[k] = beta2 * state.row[k] + (1 - beta2) * square.mean(-1, keepdim=True)
                column[k] = beta2 * state.column[k] + (1 - beta2) * square.mean(-2, keepdim=True)
                scaled[k] = n * inverse_root(row[k], column[k])
            else:
                nu[k] = beta2 * state.nu[k] + (1 - beta2) * (g * g if eps is not None else g * g + in_square)
                v = nu[k]
                if amsgrad:
                    v = largest[k] = torch.maximum(state.largest[k], v)
                if eps is None:
                    scaled[k] = n * v.rsqrt()
                elif factored:
                    scaled[k] = n / ((v + 1e-15).sqrt() + eps)
                else:
                    scaled[k] = plain / (v.sqrt() / correction + eps)
        before = {k: 1 * m for k, m in state.mu.items()}
        return scaled, ScaleByAdapnmState(mu, before, row, column, nu, largest, power2)

    roles = (MATRIX, ELEMENTWISE) if factored else ()
    moments = ("row", "column", "nu", "largest")
    extras = Extras("scale_by_adapnm", by_name(b1, b2, b0), roles, second_moments=moments)
    return Transform(init, update, extras)
