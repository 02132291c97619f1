"""Orthogonalization of matrices by a polynomial iteration: matrix products only, no factorization, no host sync."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fusion_compile.optim.matrix.coefficients import POLYNOMIALS, Coefficients

GRAM_FROM = 2
"""Ratio of the sides from which the iterations run in the Gram matrix when they may."""

_ROUNDING = 1.05
"""What rounding may add to the norm of a result before the guard acts; 1.003 times the polynomial's bound was seen."""


def orthogonalize(
    x: Tensor,
    coefficients: str = "jordan",
    matmul_dtype: torch.dtype = torch.bfloat16,
    gram_restarts: tuple[int, ...] | None = None,
    guard: bool | None = None,
    iterations: int | None = None,
) -> Tensor:
    """Approximate U Vᵀ of ``x = U Σ Vᵀ`` by five iterations of a polynomial.

    The input is divided by its norm (as the polynomial's source does) in fp32 or fp64 *before* the cast, so that fp16
    neither overflows nor divides by zero. The Gram matrix is taken on the short side.
    Source: Jordan's Muon, ``torch.optim.Muon``; Gram Newton-Schulz: Zhang, Amsel, Chen & Dao 2026.

    Args:
        x: Matrices ``[..., m, n]``.
        coefficients: ``"jordan"``, ``"quintic"`` or ``"polar_express"``.
        matmul_dtype: Dtype of the matrix products.
        gram_restarts: If one side is at least twice the other, run the same polynomial in the Gram matrix, and restart
            from x at these iterations. None: plain iterations. `safe_gram_restarts` says which restarts are safe.
        guard: Bound ‖O‖_F, see `_guarded`. None: only if the iterations run in the Gram matrix. Plain ones need no
            guard, because each multiplies x by a polynomial of x itself; no singular value was ever seen 0.4 % over the
            polynomial's bound.
        iterations: Only so many, the first ones; None: all.

    Returns:
        ``[..., m, n]`` in the dtype of x.

    Example:
        >>> import torch
        >>> x = torch.diag(torch.tensor([3.0, 1.0]))
        >>> o = orthogonalize(x, "quintic", torch.float32)
        >>> bool((o - torch.eye(2)).abs().max() < 0.04)
        True
    """
    triples, bound, _, scale, floor, offset = POLYNOMIALS[coefficients]
    triples = triples[:iterations]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    norm = (y * y).sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt()
    y = (y / ((norm * scale).clamp(min=floor) + offset)).to(matmul_dtype)
    shape = y.shape
    y = y.reshape(-1, *shape[-2:]) if y.ndim != 3 else y
    long, short = max(shape[-2:]), min(shape[-2:])
    in_gram = gram_restarts is not None and long >= GRAM_FROM * short
    for begin, end in _groups(gram_restarts, len(triples)):
        if in_gram:
            y = _iterate_in_gram(y, triples[begin:end])
        else:
            for triple in triples[begin:end]:
                y = _iterate(y, *triple)
    y = y.reshape(shape)
    if in_gram if guard is None else guard:
        y = _guarded(y, norm, _ROUNDING * bound * short**0.5)
    return y.to(x.dtype)


def _groups(gram_restarts: tuple[int, ...] | None, iterations: int) -> list[tuple[int, int]]:
    """``(first, last + 1)`` of the iterations between two restarts."""
    return list(pairwise((0, *(gram_restarts or ()), iterations)))


def _guarded(o: Tensor, given: Tensor, limit: float) -> Tensor:
    """`o` if ``‖o‖_F ≤ limit``, the largest norm of an orthogonalized matrix; else ``o (limit / ‖o‖_F)²``.

    An excess norm comes from a few directions. Scaling to the limit would still leave them √min(m, n) times too large,
    so the scale is squared: the larger the excess, the smaller the result. A matrix that is not finite becomes zero,
    unless its input (norm `given`) was not finite either: a broken gradient stays visible. A Frobenius norm does not
    show one direction that is a few times too large: the guard keeps a run alive, and does not replace safe restarts.
    It reads o once for its norm; the scale fuses into whatever comes next.
    """
    o = o.to(torch.promote_types(o.dtype, torch.float32))
    norm = (o * o).sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt()
    shrink = (limit / norm).clamp(max=1.0).square()
    failed = ~torch.isfinite(norm) & torch.isfinite(given)
    return torch.where(failed, 0.0, o * shrink)


def _gram(x: Tensor) -> Tensor:
    """``x xᵀ`` of a wide, ``xᵀ x`` of a tall ``[K, m, n]``. Nothing is transposed in memory."""
    return torch.bmm(x.mT, x) if x.size(-2) > x.size(-1) else torch.bmm(x, x.mT)


def _iterate(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """``a x + (b A + c A²) x``, A the Gram matrix; 4 products of mn·min and 2 of min³ in half-FLOPs."""
    gram = _gram(x)  # A = x @ x.T
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # B = b * A + c * A @ A
    if x.size(-2) > x.size(-1):
        return torch.baddbmm(x, x, polynomial, beta=a)  # a * x + x @ B
    return torch.baddbmm(x, polynomial, x, beta=a)  # a * x + B @ x


def _iterate_in_gram(x: Tensor, coefficients: Coefficients) -> Tensor:
    """All of `coefficients` with one rectangular product each way: ``x ← Q x``, Q a polynomial in the Gram matrix.

    An iteration multiplies x by Z + a I, Z = b R + c R², and the Gram matrix by its square: R ← (Z + a I)² R. The
    identity stays out of the factors while they grow and joins Q in fp32, inside the last product: added to x, or to a
    rounded Q, it would cancel against what was rounded (bf16, random 384×1536: error 0.061 instead of 0.019).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    identity = torch.eye(min(x.shape[-2:]), dtype=wide, device=x.device)
    r = _gram(x)  # R = x @ x.T
    q, shift = r, 0.0  # so far Q = q + shift I
    for i, (a, b, c) in enumerate(coefficients):
        z = torch.baddbmm(r, r, r, beta=b, alpha=c)  # Z = b * R + c * R @ R
        last = i + 1 == len(coefficients)
        if i == 0:
            q, shift = (z.to(wide) + a * identity).to(x.dtype) if last else z, a
        else:
            # (Z + a I) (q + shift I) = Z @ q + (shift * Z + a * q) + a * shift * I
            rest = shift * z.to(wide) + a * q.to(wide)
            shift = a * shift
            q = torch.baddbmm((rest + shift * identity if last else rest).to(x.dtype), z, q)
        if not last:
            rz = torch.baddbmm(r, r, z, beta=a)  # R (Z + a I) = a * R + R @ Z
            r = torch.baddbmm(rz, z, rz, beta=a)  # (Z + a I) R (Z + a I) = a * RZ + Z @ RZ
    return torch.bmm(x, q) if x.size(-2) > x.size(-1) else torch.bmm(q, x)  # Q @ x


AUTO = "auto"


def safe_gram_restarts(coefficients: str, matmul_dtype: torch.dtype) -> tuple[int, ...] | None:
    """The cheapest restarts with which no iteration can diverge; None if there are none.

    Q's rounding is relative to its largest eigenvalue, the product of the group's a, and acts on directions in which Q
    is near 1: with a share ε/4 of it a singular value near 1 leaves its band by ``ε/4 · Π a``. If that is more than the
    polynomial's `room`, the next group diverges. It does: with one or two directions that hold most of the norm, (3,)
    in bf16 gave singular values of 50 (Jordan, 256×512) and 1e6 (Polar Express). Nothing follows the last group, so it
    may have three iterations, as in the source: fp32 (3,), the more exact of the two; fp16 (3,), Polar Express (2,);
    bf16 (2,), Polar Express None.

    In bf16 (2,) is less exact than plain iterations: error against the exact polynomial 0.033 for random matrices
    (plain 0.010), 0.15 over five decades (0.08), 0.27 at rank 8 (0.34); largest singular value seen 1.3 times the bound
    of Jordan's coefficients, 1.14 times the quintic's. (2, 4) is as exact as plain ones and costs a sixth more than
    (2,).
    """
    triples, _, room, *_ = POLYNOMIALS[coefficients]
    for restarts in ((3,), (2,)):
        before_the_last = _groups(restarts, len(triples))[:-1]
        gains = [prod(a for a, _, _ in triples[begin:end]) for begin, end in before_the_last]
        if max(gains) * torch.finfo(matmul_dtype).eps / 4 <= room:
            return restarts
    return None


def resolve_gram_restarts(
    gram_restarts: tuple[int, ...] | str | None, coefficients: str, matmul_dtype: torch.dtype
) -> tuple[int, ...] | None:
    """`gram_restarts` with ``"auto"`` replaced by the safe ones. ValueError unless they are increasing iteration
    numbers that the polynomial has."""
    last = len(POLYNOMIALS[coefficients].coefficients) - 1
    if gram_restarts is None:
        return None
    if gram_restarts == AUTO:
        return safe_gram_restarts(coefficients, matmul_dtype)
    numbers = isinstance(gram_restarts, tuple) and all(type(i) is int for i in gram_restarts)
    if not numbers or any(b <= a for a, b in pairwise((0, *gram_restarts, last + 1))):
        raise ValueError(
            f"gram_restarts={gram_restarts!r} are not increasing iteration numbers between 1 and {last}; give 'auto', "
            f"a tuple like (2, 4), or None for plain iterations."
        )
    assert isinstance(gram_restarts, tuple)
    return gram_restarts
