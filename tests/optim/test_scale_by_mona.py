"""MONA's one-buffer form against the two-buffer equations."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fusion_compile.optim import Transform, chain, scale_by_learning_rate
from fusion_compile.optim.scale_by_mona import scale_by_mona
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, a_bank_moves_as_its_members, distance, keeps_the_laws, nodes
from tests.oracles.mona import Mona


def descent(beta: float = 0.99, alpha: float | None = None) -> Transform:
    return chain(scale_by_mona(beta, alpha), scale_by_learning_rate(0.02))


@pytest.mark.parametrize(("beta", "alpha"), [(0.99, None), (0.975, None), (0.9, 0.2), (0.9, -3.0), (0.5, 0.0)])
def test_one_buffer_is_the_two_buffers_of_the_paper(beta: float, alpha: float | None) -> None:
    """Measured: 3e-16, a rounding."""
    twin = partial(Mona, lr=0.02, beta=beta, alpha=alpha)
    assert distance(descent(beta, alpha), twin, torch.float64, tuple(SHAPES)) <= 1e-9


def test_fp32_follows_the_float64_twin() -> None:
    """100 steps, each rounding weights up to 10 times larger than a step by 6e-8: at most 6e-5; measured
    2e-7, as the descent forgets them."""
    assert distance(descent(), partial(Mona, lr=0.02), torch.float32, tuple(SHAPES)) <= 6e-5


def test_the_bound_sees_a_beta_that_is_slightly_off() -> None:
    assert distance(descent(0.989), partial(Mona, lr=0.02), torch.float64, tuple(SHAPES)) > 1e-4


def test_the_published_rule_is_half_gradient_and_half_average() -> None:
    g = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    walk = Walk(scale_by_mona(0.9), {"w": torch.zeros(3, 4, dtype=torch.float64)})
    torch.testing.assert_close(walk({"w": g[0]})["w"], g[0])  # no acceleration yet
    torch.testing.assert_close(walk({"w": g[1]})["w"], g[1] / 2 + g[0] / 2)
    torch.testing.assert_close(walk({"w": g[2]})["w"], g[2] / 2 + (0.9 * g[0] + 0.1 * g[1]) / 2)


def test_beta_and_alpha_are_live() -> None:
    g1, g2 = torch.randn(2, 5, dtype=torch.float64)
    walk = Walk(scale_by_mona(0.9, alpha=2.0), {"w": torch.zeros(5, dtype=torch.float64)})
    walk({"w": g1})
    torch.testing.assert_close(walk({"w": g2}, mona_alpha=-1.0, mona_beta=0.5)["w"], g2 - 0.5 * (g2 - g1))


def test_laws() -> None:
    for dtype in (torch.float32, torch.float64):
        keeps_the_laws(
            scale_by_mona(), {"spectral/a": torch.randn(3, 8, 5, dtype=dtype), "scalar/b": torch.randn(7, dtype=dtype)}
        )
    a_bank_moves_as_its_members(descent)
    assert nodes(scale_by_mona(), {"w": torch.empty(4, 8, 5)}) == nodes(scale_by_mona(), {"w": torch.empty(28, 8, 5)})
