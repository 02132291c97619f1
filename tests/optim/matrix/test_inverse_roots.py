"""Inverse roots by matrix products and eigenbases by QR, against eigendecompositions in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.optim.matrix.inverse_roots import (
    _n_steps,
    eigenbasis,
    from_basis,
    inverse_root,
    power_step,
    to_basis,
)
from tests.optim.tensor_float32 import TensorFloat32
from tests.oracles.shampoo import inverse_root as exact_root

RIDGE = 1e-6


def spectrum(values: Tensor, k: int = 2) -> Tensor:
    """`k` symmetric float64 matrices with these eigenvalues and random eigenvectors."""
    n = values.numel()
    q = torch.linalg.qr(torch.randn(k, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    m = (q * values.double()) @ q.mT
    return 0.5 * (m + m.mT)


MATRICES: dict[str, Callable[[], Tensor]] = {
    "well conditioned": lambda: spectrum(torch.linspace(1, 5, 24)),
    "eight decades": lambda: spectrum(torch.logspace(0, -8, 48)),
    "rank 8 of 32": lambda: spectrum((torch.arange(32) < 8).double()),
    "identity": lambda: torch.eye(16, dtype=torch.float64).expand(2, 16, 16),
    "one large": lambda: spectrum(torch.tensor([1.0] + [1e-4] * 15)),
    "1 by 1": lambda: torch.tensor([[[3.0]], [[0.25]]], dtype=torch.float64),
}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1.1e-16), (torch.float32, 6e-8)])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("kind", MATRICES)
def test_it_is_the_root_by_eigendecomposition(kind: str, p: int, dtype: torch.dtype, rounding: float) -> None:
    """To rounding times the condition number, which the ridge holds at 1e6, and that of some twenty products. Measured:
    up to 0.5 of that."""
    m = MATRICES[kind]()
    wanted = torch.stack([torch.from_numpy(exact_root(one.numpy(), p, RIDGE)) for one in m])
    found = inverse_root(m.to(dtype), p, ridge=RIDGE)
    values = torch.linalg.eigvalsh(m)
    norm = m.abs().sum(-1).amax(-1)
    condition = float((norm / (values.amin(-1).clamp(min=0) + RIDGE * norm)).max())
    assert found.dtype == dtype and torch.equal(found, found.mT)
    assert relative(found, wanted) <= rounding * (20 + condition)


@pytest.mark.parametrize("p", [2, 4])
def test_its_power_inverts_the_matrix(p: int) -> None:
    m = MATRICES["well conditioned"]()
    root = inverse_root(m, p, ridge=1e-12)
    identity = torch.eye(24, dtype=torch.float64).expand_as(m)
    torch.testing.assert_close(torch.linalg.matrix_power(root, p) @ m, identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ridge", [1e-12, 1e-6, 1e-3, 1.0])
def test_every_ridge_has_the_iterations_that_it_needs(ridge: float) -> None:
    """The smallest eigenvalue there can be, 0, comes out as ridge^(-1/p) to 1e-15, times the condition in rounding."""
    m = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    for p in (2, 4):
        root = inverse_root(m, p, ridge=ridge)
        wanted = torch.tensor([(1 + ridge) ** (-1 / p), ridge ** (-1 / p)], dtype=torch.float64)
        torch.testing.assert_close(root.diag(), wanted, rtol=1e-14, atol=0)
    assert [_n_steps(p, 1e-4) for p in (2, 4)] == [16, 15]


@pytest.mark.parametrize("scale", [1e-34, 1e-18, 1e8, 1e34])
def test_the_root_of_a_scaled_matrix_is_the_scaled_root(scale: float) -> None:
    """In fp32, over its range: the matrix is divided by its norm before anything is squared."""
    m = MATRICES["well conditioned"]().float()
    for p in (2, 4):
        wanted = inverse_root(m, p).double() * scale ** (-1 / p)
        assert relative(inverse_root(m * scale, p), wanted) < 1e-5


def test_a_zero_matrix_has_the_root_one_and_does_not_disturb_its_neighbour() -> None:
    m = torch.stack([torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 16.0, 1.0, 16.0]))])
    found = inverse_root(m, 4, ridge=1e-8)
    assert torch.equal(found[0], torch.eye(4))
    torch.testing.assert_close(found[1].diag(), torch.tensor([1.0, 0.5, 1.0, 0.5]), rtol=1e-5, atol=0)


def test_a_matrix_without_a_batch_and_one_with_two_are_the_same() -> None:
    m = MATRICES["well conditioned"]()
    torch.testing.assert_close(inverse_root(m[0], 4), inverse_root(m, 4)[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(inverse_root(m[None], 4), inverse_root(m, 4)[None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", MATRICES)
def test_the_default_ridge_is_enough_for_tensor_float_32(kind: str) -> None:
    m = MATRICES[kind]()
    wanted = torch.stack([torch.from_numpy(exact_root(one.numpy(), 4, 1e-4)) for one in m])
    with TensorFloat32():
        # A rounding of 5e-4, ten of them in the smallest eigenvalue of 1e-4 to 1e-3: measured 0.13 at most.
        assert relative(inverse_root(m.float(), 4), wanted) < 0.2


def test_where_products_are_too_coarse_for_the_ridge_the_root_is_not_a_number() -> None:
    m = torch.stack([MATRICES["rank 8 of 32"]()[0], torch.eye(32)]).float()
    with TensorFloat32():
        found = inverse_root(m, 4, ridge=1e-7)
    assert bool(found[0].isnan().all()) and relative(found[1], torch.eye(32).double()) < 1e-3


def test_bfloat16_is_computed_in_fp32() -> None:
    m = MATRICES["well conditioned"]().bfloat16()
    found = inverse_root(m, 4)
    assert found.dtype == torch.bfloat16 and torch.equal(found, inverse_root(m.float(), 4).bfloat16())


@pytest.mark.parametrize(("p", "ridge"), [(3, 1e-6), (4, 0.0), (4, float("nan")), (2, 2.0)])
def test_what_cannot_work_is_refused(p: int, ridge: float) -> None:
    with pytest.raises(ValueError, match=r"p=3|ridge="):
        inverse_root(torch.eye(3), p, ridge=ridge)


def test_the_root_and_the_power_step_are_traced_without_factorization_of_a_spectrum_or_a_host_read() -> None:
    m, q = torch.eye(6).expand(3, 6, 6).clone(), torch.eye(6).expand(3, 6, 6).clone()
    graph = make_fx(lambda m, q: (inverse_root(m, 4), power_step(m, q)), tracing_mode="fake")(m, q).graph
    names = {str(node.target) for node in graph.nodes}
    assert "aten.linalg_qr.default" in names
    assert not any("eigh" in n or "svd" in n or "local_scalar" in n for n in names)


def test_power_steps_find_the_eigenbasis() -> None:
    """From I, with eigenvalues a factor of 2 apart: what is left off the diagonal halves with every step."""
    m = spectrum(2.0 ** -torch.arange(6))
    q = torch.eye(6, dtype=torch.float64).expand_as(m).clone()
    for _ in range(60):
        q = power_step(m, q)
    off = q.mT @ m @ q - spectrum_of(m).diag_embed()
    assert q.is_contiguous() and float(off.abs().max()) < 1e-12


def spectrum_of(m: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(m).flip(-1)


@pytest.mark.parametrize("kind", ["rank 8 of 32", "eight decades", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_power_step_is_orthonormal_whatever_the_matrix(kind: str, dtype: torch.dtype) -> None:
    m = torch.zeros(2, 32, 32, dtype=dtype) if kind == "zero" else MATRICES[kind]().to(dtype)
    q = power_step(m, eigenbasis(spectrum(torch.arange(m.size(-1)))).to(dtype))
    identity = torch.eye(m.size(-1), dtype=dtype).expand_as(q)
    torch.testing.assert_close(q.mT @ q, identity, rtol=0, atol=m.size(-1) * torch.finfo(dtype).eps)


def test_a_power_step_that_is_not_finite_keeps_the_old_basis_of_that_matrix_only() -> None:
    m = spectrum(torch.linspace(1, 5, 8), k=3).float()
    q = eigenbasis(spectrum(torch.linspace(1, 9, 8), k=3).float().roll(1, -1))
    broken = m.clone()
    broken[1, 2, 3] = torch.nan
    after = power_step(broken, q)
    assert torch.equal(after[1], q[1]) and torch.equal(after[0], power_step(m, q)[0])
    assert not torch.equal(after[0], q[0]) and not torch.equal(after[2], q[2])


def test_a_power_step_in_numpy_is_the_same_up_to_signs() -> None:
    m = spectrum(torch.logspace(0, -3, 10), k=1)[0]
    start = eigenbasis(spectrum(torch.linspace(1, 2, 10), k=1)[0].roll(2, 0).mT @ m)
    wanted = np.linalg.qr(m.numpy() @ start.numpy()).Q
    np.testing.assert_allclose(np.abs(power_step(m, start).numpy()), np.abs(wanted), rtol=0, atol=1e-12)


def test_the_eigenbasis_falls_and_survives_what_is_not_finite() -> None:
    m = spectrum(torch.tensor([3.0, 1.0, 2.0]))
    broken = m.clone()
    broken[1, 0, 0] = torch.inf
    q = eigenbasis(broken)
    torch.testing.assert_close(
        (q.mT @ m @ q)[0], torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(q[1] @ q[1].mT, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)
    assert q.is_contiguous()


def test_to_a_basis_and_back() -> None:
    left, right = eigenbasis(spectrum(torch.arange(4))), eigenbasis(spectrum(torch.arange(7)))
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(from_basis(to_basis(x, left, right), left, right), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(to_basis(left @ x @ right.mT, left, right), x, rtol=0, atol=1e-14)
