"""KL-Shampoo's factors: each side's covariance measured in the metric of the other side (Lin et al., 2509.03378)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._kronecker import eye_like, zero_factors
from fusion_compile.optim._tree import map_tensors
from fusion_compile.optim.matrix.inverse_roots import eigenbasis, power_step


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


class KLOptions(NamedTuple):
    """The numbers of the coupled factors that are not live; see `scale_by_kl_shampoo`."""

    init_factor: float = 0.1
    max_inverse_root: float | None = 4000.0


def check_options(options: KLOptions) -> KLOptions:
    """`options`. ValueError if they would divide by zero."""
    if not options.init_factor > 0:
        raise ValueError(f"init_factor={options.init_factor!r} is the first eigenvalue; use a number above 0.")
    if options.max_inverse_root is not None and not options.max_inverse_root > 0:
        raise ValueError(f"max_inverse_root={options.max_inverse_root!r} bounds 1/√λ; use a number above 0, or None.")
    return options


def init_factors(params: Tensors, what: str) -> KLFactors:
    """Covariances 0, bases and roots 1: the first gradient is then measured in its own metric, G Gᵀ / n."""
    left, right = zero_factors(params, what)
    bases = map_tensors(eye_like, left), map_tensors(eye_like, right)
    roots = (map_tensors(lambda s: torch.ones_like(s[..., 0]), side) for side in (left, right))
    return KLFactors(left, right, *bases, *roots)


def update_factors(f: KLFactors, gradients: Tensors, beta: Tensor, first: Tensor, options: KLOptions) -> KLFactors:
    """Covariances and eigenvalues after these gradients, in the present bases. `first`: 0-dim, whether they are the
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
    """1/√λ of ``λ ← lerp(λ, measured, 1 - beta)``. If λ is 0 the result is 0, as for an infinite variance."""
    eigenvalue = _finite(1 / root.square())
    new = _finite((eigenvalue + (1 - beta) * (measured - eigenvalue)).rsqrt())
    if options.max_inverse_root is not None:
        new = new.clamp(max=max(10.0, min(float(root.size(-1)), options.max_inverse_root)))
    return torch.where(first, options.init_factor**-0.5, new)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def refresh_bases(f: KLFactors) -> KLFactors:
    """Both bases by one power iteration and QR; the eigenvalues stay."""
    left_basis = map_tensors(power_step, f.left, f.left_basis)
    return f._replace(left_basis=left_basis, right_basis=map_tensors(power_step, f.right, f.right_basis))


def find_bases(f: KLFactors) -> KLFactors:
    """Both bases by an eigendecomposition; the eigenvalues stay."""
    return f._replace(left_basis=map_tensors(eigenbasis, f.left), right_basis=map_tensors(eigenbasis, f.right))
