"""Inverse roots of positive semi-definite matrices, and their eigenbases, without an eigendecomposition in the graph.

`inverse_root` uses matrix products only. `power_step` updates an eigenbasis by one QR; `eigenbasis` finds the first
one and is the only function here that cannot be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_root(m: Tensor, p: int, *, ridge: float = 1e-4) -> Tensor:
    """``(M + ridge ‖M‖ I)^(-1/p)`` of symmetric positive semi-definite M ``[..., n, n]``, p = 2 or 4; M's dtype.

    Example:
        >>> import torch
        >>> root = inverse_root(torch.diag(torch.tensor([16.0, 81.0])), 4, ridge=1e-6)
        >>> [round(float(r), 3) for r in root.diagonal()]
        [0.5, 0.333]

    The coupled Newton iteration ``T = ((p + 1) I - A) / p; X ← X T; A ← T^p A`` from ``A = z M, X = z^(1/p) I``: A goes
    to I and X to the root (Iannazzo 2006; Anil et al., 2002.09018). ‖M‖ is the largest row sum, between the largest
    eigenvalue and √n times it. The ridge bounds the condition number and so the number of iterations, which is fixed:
    16 at the default for p = 2, 15 for p = 4, of three and four products of n³. The root of a zero matrix is I.

    Products run in fp32, or fp64 if M is fp64. The error is their rounding times the condition number: 1e-4 at the
    default ridge in fp32, 1e-2 at a ridge of 1e-6. In TensorFloat32, whose products lose everything below 1e-3 of the
    largest eigenvalue, 1e-4 is the smallest ridge that works (error up to 0.2). If the products are too coarse for the
    ridge, the iteration diverges and the root is NaN.
    """
    check_root(p, ridge)
    wide = torch.promote_types(m.dtype, torch.float32)
    m, dtype = m.to(wide), m.dtype
    identity = torch.eye(m.size(-1), dtype=wide, device=m.device)
    norm = m.abs().sum(-1).amax(-1)[..., None, None]
    known = norm > torch.finfo(wide).tiny
    scale = torch.where(known, norm, torch.ones_like(norm))
    # The largest eigenvalue of A is then at most (p + 1) / 2, inside the region of convergence, which ends at p + 1.
    z = (p + 1) / (2 * (1 + ridge))
    a = z * (0.5 * (m + m.mT) / scale + ridge * identity)
    x = z ** (1 / p) * identity.expand_as(m)
    n_steps = _n_steps(p, ridge)
    for i in range(n_steps):
        t = ((p + 1) * identity - a) / p
        x = x @ t
        if i + 1 < n_steps:
            square = t @ t
            a = (square @ square if p == 4 else square) @ a
    # `a` is the one before the last iteration. Half of the rounding error in x is not symmetric.
    converged = (a - identity).abs().amax(-1, keepdim=True).amax(-2, keepdim=True) < 0.5
    root = torch.where(converged, 0.5 * (x + x.mT) * scale ** (-1 / p), torch.nan)
    return torch.where(known, root, identity).to(dtype)


def check_root(p: int, ridge: float) -> None:
    """ValueError if `inverse_root` cannot compute this root with this ridge."""
    if p not in (2, 4):
        raise ValueError(f"p={p!r} is not known; use 2 (inverse square roots) or 4 (inverse fourth roots).")
    if not 1e-12 <= ridge <= 1:
        raise ValueError(f"ridge={ridge!r} is relative to the norm of the matrix; use a number from 1e-12 to 1.")


def _n_steps(p: int, ridge: float) -> int:
    """Iterations until the smallest possible eigenvalue, which grows at most ((p + 1) / p)^p times in each, and the
    largest are 1. Eigenvalues between them are nearer to 1 after the first iteration."""
    highest = (p + 1) / 2
    ends, n = [highest * ridge / (1 + ridge), highest], 0
    while any(abs(1 - a) > 1e-8 for a in ends):
        ends, n = [a * ((p + 1 - a) / p) ** p for a in ends], n + 1
    return n + 1  # convergence is quadratic: from 1e-8 to 1e-16


def power_step(s: Tensor, q: Tensor) -> Tensor:
    """``qr(S Q).Q``: one power iteration from an old eigenbasis ``[..., n, n]`` towards that of S; Q's dtype.

    The result is contiguous, and orthonormal for every S, including singular and zero ones. If it is not finite, the
    matrix keeps its old basis. Source: the refresh of SOAP (2409.11321) and KL-Shampoo (2509.03378).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    new = torch.linalg.qr(s.to(wide) @ q.to(wide)).Q.to(q.dtype).contiguous()
    return torch.where(all_finite(new), new, q)


def eigenbasis(s: Tensor) -> Tensor:
    """Eigenvectors of symmetric ``[..., n, n]`` as columns, by falling eigenvalue; contiguous, in S's dtype.

    By ``eigh``, which waits for the device and cannot be captured. In fp64 if fp32 does not converge. The basis of a
    matrix that is not finite is I.
    """
    wide = torch.promote_types(s.dtype, torch.float32)
    safe = torch.where(all_finite(s), s, torch.zeros_like(s)).to(wide)
    vectors: Tensor
    try:
        vectors = torch.linalg.eigh(safe).eigenvectors
    except RuntimeError:  # torch.linalg.LinAlgError is one
        vectors = torch.linalg.eigh(safe.double()).eigenvectors
    return vectors.flip(-1).to(s.dtype).contiguous()


def all_finite(x: Tensor) -> Tensor:
    """Whether every entry of a matrix is finite: ``[..., m, n]`` to ``[..., 1, 1]``."""
    return torch.isfinite(x).all(-1).all(-1)[..., None, None]


def to_basis(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``Leftᵀ X Right``, for ``[..., m, n]`` and orthonormal bases of its sides."""
    return left.mT @ x @ right


def from_basis(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``Left X Rightᵀ``."""
    return left @ x @ right.mT
