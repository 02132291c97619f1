"""Orthogonalization of matrices by a polynomial iteration: matrix products only, no factorization, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile.optim.matrix.coefficients import TABLES


def orthogonalize(x: Tensor, table: str = "jordan", hot_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate U Vᵀ of ``x = U Σ Vᵀ``; shape ``[..., m, n]``, result in x's dtype.

    Five iterations with the named coefficient table (``"jordan"``, ``"quintic"``, ``"polar_express"``), products in
    `hot_dtype`.
    The input is divided by its norm (as the table's source does) in fp32 or fp64 *before* the cast, so that fp16
    neither overflows nor divides by zero. Works on the short side. Source: Jordan's Muon, ``torch.optim.Muon``.
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
    for a, b, c in coefficients:
        gram = torch.bmm(y, y.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a, alpha=1.0)
    y = y.reshape(shape)
    return (y.mT if tall else y).to(x.dtype)


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
