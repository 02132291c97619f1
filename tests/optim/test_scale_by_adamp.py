"""AdamP against its twin, on gradients that are orthogonal to the weights and on others."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fusion_compile import optim
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, distance, keeps_the_laws
from tests.oracles.adam_variants import AdamP
from tests.oracles.protocol import float64_copies


def make(weight_decay: float = 0.1) -> optim.Transform:
    return optim.chain(optim.scale_by_adamp(weight_decay=weight_decay), optim.scale_by_learning_rate(1e-2))


def test_it_follows_its_twin() -> None:
    assert distance(make(), partial(AdamP, lr=1e-2, weight_decay=0.1), torch.float64, tuple(SHAPES)) <= 1e-9


@pytest.mark.parametrize("by_row", [True, False])
def test_gradients_orthogonal_to_the_weights_lose_their_radial_part(by_row: bool) -> None:
    torch.manual_seed(0)
    p = torch.randn(6, 50, dtype=torch.float64)
    walk, twin = Walk(make(), {"w": p}), AdamP({"w": p}, lr=1e-2, weight_decay=0.1)
    plain = AdamP({"w": p}, lr=1e-2, weight_decay=0.1)
    plain._projected = staticmethod(lambda u, p, g: (u, 1.0))  # type: ignore[method-assign]
    for _ in range(5):
        g = torch.randn(6, 50, dtype=torch.float64)
        w = walk.params["w"]
        axes = (-1,) if by_row else (-1, -2)
        g = g - w * (g * w).sum(axes, keepdim=True) / (w * w).sum(axes, keepdim=True)
        walk({"w": g})
        twin.step({"w": g})
        plain.step({"w": g})
    np.testing.assert_allclose(float64_copies(walk.params)["w"], twin.weights()["w"], rtol=1e-10)
    assert np.abs(twin.weights()["w"] - plain.weights()["w"]).max() > 1e-4


def test_laws() -> None:
    keeps_the_laws(make(), {"matrix/a": torch.randn(3, 8, 5), "scalar/b": torch.randn(7)})
