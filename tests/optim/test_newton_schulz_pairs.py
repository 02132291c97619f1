"""Iterations composed two by two are the plain iterations, and in bf16 no less exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_compile import optim
from fusion_compile.optim.matrix.newton_schulz import orthogonalize


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("table", ["jordan", "quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 96, 32), (1, 16, 16), (20, 40)])
def test_pairs_are_the_same_polynomial(table: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    plain = orthogonalize(x, table, torch.float64)
    # 1e-11: two orders over the 1e-13 that rounding in the composed factor was seen to leave.
    assert relative_error(orthogonalize(x, table, torch.float64, pairs=True), plain) < 1e-11


def test_in_bf16_pairs_are_about_as_exact_on_random_matrices_and_more_exact_at_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, 256, 1024, generator=generator)
    low_rank = torch.randn(2, 256, 4, generator=generator) @ torch.randn(2, 4, 1024, generator=generator)
    errors = {}
    for name, x in (("random", random), ("low rank", low_rank)):
        exact = orthogonalize(x.double(), hot_dtype=torch.float64)
        errors[name] = [relative_error(orthogonalize(x, pairs=pairs), exact) for pairs in (False, True)]
    # Seen: 0.0126 against 0.0119, and 0.45 against 0.55; at 64x256 pairs are 1.6 times worse on random matrices.
    assert errors["random"][1] < 1.25 * errors["random"][0]
    assert errors["low rank"][1] < 0.95 * errors["low rank"][0]


def test_the_transform_pairs_only_when_asked() -> None:
    params = {"spectral/32x128": torch.zeros(1, 32, 128)}
    low_rank = torch.randn(1, 32, 2) @ torch.randn(1, 2, 128)
    plain, paired = (
        optim.orthogonalize(0.0, nesterov=False, pairs=p).update(
            {"spectral/32x128": low_rank},
            optim.orthogonalize(0.0, nesterov=False).init(params),
            params,
            optim.Context({"momentum": torch.tensor(0.0)}),
        )[0]["spectral/32x128"]
        for p in (False, True)
    )
    assert torch.equal(plain, orthogonalize(low_rank))
    assert torch.equal(paired, orthogonalize(low_rank, pairs=True))
    assert not torch.equal(plain, paired)
