"""Lion against its twin and against lion-pytorch."""

from __future__ import annotations

from functools import partial

import lion_pytorch  # type: ignore[import-not-found, import-untyped, unused-ignore]
import pytest
import torch

from fusion_compile.optim import Transform, add_decayed_weights, chain, scale_by_learning_rate
from fusion_compile.optim.scale_by_lion import scale_by_lion
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, a_bank_moves_as_its_members, distance, keeps_the_laws, nodes, to_torch
from tests.oracles.lion import Lion
from tests.oracles.protocol import float64_copies
from tests.problems import BowlGradient, run_torch


def lion(weight_decay: float = 0.1, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> Transform:
    return chain(scale_by_lion(betas), add_decayed_weights(weight_decay), scale_by_learning_rate(lr))


def test_lion_follows_its_twin() -> None:
    twin = partial(Lion, lr=1e-3, weight_decay=0.1)
    assert distance(lion(), twin, torch.float64, tuple(SHAPES)) <= 1e-9


def test_fp32_follows_the_float64_twin() -> None:
    """A step is ±lr, so only roundings of the weights (6e-8 of 0.2, beside steps of 1e-3) add up, unless an average is
    so near zero that its sign rounds: then one entry of 128 x 128 is 2 lr off, 2e-3 of a displacement of 100 lr.
    Measured 2e-4."""
    assert distance(lion(), partial(Lion, lr=1e-3, weight_decay=0.1), torch.float32, tuple(SHAPES)) <= 2e-3


def test_lion_is_lion_pytorch() -> None:
    """In float64, the decay included, over 100 updates of the Bowl: to rounding, which no sign came near."""
    gradient = BowlGradient()
    params: dict[str, torch.Tensor] = {n: torch.nn.Parameter(p) for n, p in to_torch(gradient.start).items()}
    official = lion_pytorch.Lion(params.values(), lr=1e-3, betas=(0.95, 0.98), weight_decay=0.3)
    run_torch(params, official.step, range(1, 101), lambda update: None)
    walk = Walk(lion(0.3, betas=(0.95, 0.98)), to_torch(gradient.start))
    for update in range(1, 101):
        walk(to_torch(gradient(float64_copies(walk.params), update)))
    for name, p in params.items():
        torch.testing.assert_close(walk.params[name], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", [{"beta1": 0.5}, {"beta2": 0.5}])
def test_betas_are_live(changed: dict[str, float]) -> None:
    g1, g2, g3 = torch.randn(3, 50, dtype=torch.float64)
    walk = Walk(scale_by_lion((0.9, 0.9)), {"w": torch.zeros(50, dtype=torch.float64)})
    walk({"w": g1})
    b1, b2 = changed.get("beta1", 0.9), changed.get("beta2", 0.9)
    m = 0.1 * g1
    assert torch.equal(walk({"w": g2}, **changed)["w"], (b1 * m + (1 - b1) * g2).sign())
    m = b2 * m + (1 - b2) * g2
    assert torch.equal(walk({"w": g3})["w"], (0.9 * m + 0.1 * g3).sign())


def test_laws() -> None:
    for dtype in (torch.float32, torch.float64):
        keeps_the_laws(
            lion(), {"spectral/a": torch.randn(3, 8, 5, dtype=dtype), "scalar/b": torch.randn(7, dtype=dtype)}
        )
    a_bank_moves_as_its_members(lion)
    assert nodes(lion(), {"w": torch.empty(4, 8, 5)}) == nodes(lion(), {"w": torch.empty(28, 8, 5)})
