"""Orthogonalization of matrices by a polynomial iteration: matrix products only, no factorization, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile.optim.matrix.coefficients import TABLES

_PAIRS_FROM = 2
"""Ratio of the sides from which two iterations are composed in the Gram matrix."""


def orthogonalize(
    x: Tensor, table: str = "jordan", hot_dtype: torch.dtype = torch.bfloat16, pairs: bool = False
) -> Tensor:
    """Approximate U Vᵀ of ``x = U Σ Vᵀ``; shape ``[..., m, n]``, result in x's dtype.

    Five iterations with the named coefficient table (``"jordan"``, ``"quintic"``, ``"polar_express"``), products in
    `hot_dtype`. The input is divided by its norm (as the table's source does) in fp32 or fp64 *before* the cast, so
    that fp16 neither overflows nor divides by zero. Works on the short side. `pairs`: compose two iterations at a time
    where one side is at least twice the other: the same polynomial with a fifth fewer operations. Source: Jordan's
    Muon, ``torch.optim.Muon``; for `pairs`, Gram Newton-Schulz (Zhang, Amsel, Chen & Dao 2026).
    """
    coefficients, scale, floor, offset = TABLES[table]
    wide = torch.promote_types(x.dtype, torch.float32)
    tall = x.size(-2) > x.size(-1)
    y = x.to(wide)
    norm = (y * y).sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt()
    y = (y / ((norm * scale).clamp(min=floor) + offset)).to(hot_dtype)
    if tall:
        y = y.mT
    shape = y.shape
    y = y.reshape(-1, *shape[-2:]) if y.ndim != 3 else y
    if pairs and y.size(-1) >= _PAIRS_FROM * y.size(-2):
        while len(coefficients) >= 2:
            y = _two_iterations(y, *coefficients[:2])
            coefficients = coefficients[2:]
    for a, b, c in coefficients:
        gram = torch.bmm(y, y.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a, alpha=1.0)
    y = y.reshape(shape)
    return (y.mT if tall else y).to(x.dtype)


def _two_iterations(x: Tensor, first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    """Two iterations of ``[K, m, n]``, m < n, with one product by n each way: ``x ← Q x``, Q a polynomial in ``x xᵀ``.

    Gram Newton-Schulz restarted after every second iteration: 6 products of m²n and 11 of m³ for five iterations,
    where the plain form needs 10 and 5. In longer runs rounding makes the Gram matrix indefinite; bf16 fails there.
    Against the exact polynomial in bf16 (384×1536, torch 2.13 CPU): error 0.011 for random matrices (plain 0.010),
    0.039 for a spectrum over five decades (plain 0.058), 0.052 at rank 8 (plain 0.21).
    """
    (a, b, c), (a2, b2, c2) = first, second
    r = torch.bmm(x, x.mT)
    z = torch.baddbmm(r, r, r, beta=b, alpha=c)  # the first step multiplies by z + a I
    rz = torch.baddbmm(r, r, z, beta=a)
    r2 = torch.baddbmm(rz, z, rz, beta=a)  # the Gram matrix after it
    z2 = torch.baddbmm(r2, r2, r2, beta=b2, alpha=c2)
    wide = torch.promote_types(x.dtype, torch.float32)
    # (z2 + a2 I)(z + a I) with the identity inside: added to x afterwards it would cancel against q, rounded twice.
    rest = a2 * z.to(wide) + a * z2.to(wide) + a * a2 * torch.eye(r.size(-1), dtype=wide, device=x.device)
    return torch.bmm(torch.baddbmm(rest.to(x.dtype), z2, z), x)


def shape_factor(x: Tensor, adjust_lr: str) -> float:
    """Factor on lr from the shape ``[..., r, c]``.

    ``"original"``: √max(1, r/c), lr in units of spectral norm per step; ``"match_rms_adamw"``: 0.2 √max(r, c), so that
    the update's root mean square is 0.2 lr, the size of an AdamW update at that lr (2502.16982); ``"none"``: 1.
    """
    r, c = x.shape[-2:]
    if adjust_lr == "original":
        return float(max(1.0, r / c) ** 0.5)
    if adjust_lr == "match_rms_adamw":
        return float(0.2 * max(r, c) ** 0.5)
    return 1.0
