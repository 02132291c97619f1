"""FusionOpt's direction of a matrix: Shampoo's root, precisions."""

from __future__ import annotations

import pytest
import torch

from fusion_compile.optim._fusionopt.spectral import _root
from fusion_compile.optim.fusionopt_compat import fusionopt_compat
from tests.optim.fusionopt_walk import (
    OPTIONS,
    SMALL,
    SMALL_SPECTRAL,
    Banks,
    Run,
    SmallBowl,
    distance,
    follow,
)
from tests.oracles.protocol import float64_copies


def test_blocks_are_orthogonalized_each_for_itself() -> None:
    worst, _, twin = follow(OPTIONS["full fusion"], torch.float64, 10, split=2)
    assert worst <= 1e-11
    whole = follow(OPTIONS["full fusion"], torch.float64, 10)[2]
    assert distance(whole.gradient_point(), twin.gradient_point(), SmallBowl().start) > 0.01


@pytest.mark.parametrize(("hot_dtype", "bound"), [("fp16_safe", 1e-2), ("fp16", 1e-2), ("bf16", 6e-2)])
def test_hot_dtypes_move_as_fp32_up_to_their_precision(hot_dtype: str, bound: float) -> None:
    """A unit of fp16 is 5e-4, one of bf16 4e-3; five iterations and two products lose about ten (measured: 3e-3, 5e-3,
    3.5e-2). Every one of them differs from fp32, so the option is read."""
    problem, banks = SmallBowl(), Banks(SMALL, SMALL_SPECTRAL)
    components = ("ns5", "normuon", "sf", "mona", "shampoo")
    runs = [
        Run(fusionopt_compat(components, 1e-3, hot_dtype=h), banks, problem.start, torch.float32)
        for h in ("fp32", hot_dtype)
    ]
    for step in range(20):
        for run in runs:
            value, grads = problem(run.point(), step)
            run.step(grads, value)
        assert 1e-5 < distance(runs[1].point(), float64_copies(runs[0].point()), problem.start) <= bound


@pytest.mark.parametrize(("size", "finds"), [(1e-6, True), (1.0, True), (1e2, True), (1e6, False)])
def test_shampoos_root_is_that_of_the_eigenvectors_where_fp32_knows_the_eigenvalues(size: float, finds: bool) -> None:
    """Factors of rank 8 in 24, as after one gradient. FusionOpt's root is rounding noise at a norm of 1e6, where a zero
    eigenvalue is computed as ±0.1 and the ridge is 1e-4; this one then has a larger ridge, and is finite."""
    torch.manual_seed(0)
    low = torch.randn(3, 24, 8)
    m = low @ low.mT
    m = size * m / torch.linalg.matrix_norm(m, 2)[:, None, None]
    found = _root(m, torch.tensor(1e-4))
    values, vectors = torch.linalg.eigh(m.double() + 1e-4 * torch.eye(24, dtype=torch.float64))
    wanted = vectors @ torch.diag_embed(values.clamp(min=1e-12) ** -0.25) @ vectors.mT
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= 1e-6 if finds else (error > 0.1 and bool(torch.isfinite(found).all()))
