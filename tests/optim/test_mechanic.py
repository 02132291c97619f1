"""Mechanic against its twin; it finds a scale from far below, and says what it cannot wrap."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, distance, keeps_the_laws
from tests.oracles.adamw import AdamW
from tests.oracles.mechanic import Mechanic
from tests.oracles.protocol import Tensors


def test_it_follows_its_twin() -> None:
    """Over 100 updates in float64. Δ is a difference of weights over S, so roundings of 1e-16 become 1e-10."""

    def twin(start: Tensors) -> Mechanic:
        return Mechanic(AdamW(start, lr=1.0, weight_decay=0.0))

    whole = optim.mechanic(optim.adamw(1.0, weight_decay=0.0))
    assert distance(whole, twin, torch.float64, tuple(SHAPES)) <= 1e-6


def test_it_finds_the_scale_from_a_million_times_below() -> None:
    torch.manual_seed(0)
    goal = torch.randn(64, dtype=torch.float64)
    walk = Walk(optim.mechanic(optim.adamw(1.0, weight_decay=0.0)), {"w": torch.zeros(64, dtype=torch.float64)})
    for _ in range(300):
        walk({"w": walk.params["w"] - goal + 0.1 * torch.randn(64, dtype=torch.float64)})
    assert float((walk.params["w"] - goal).square().mean()) < 0.1 * float(goal.square().mean())
    assert 1e-3 < float(walk.state.scale) < 1


def test_laws_and_refusals() -> None:
    keeps_the_laws(optim.mechanic(optim.adamw(1.0)), {"scalar/b": torch.randn(7, dtype=torch.float64)})
    with pytest.raises(ValueError, match="takes none; end it with"):
        optim.mechanic(optim.scale_by_adam())
    with pytest.raises(ValueError, match="moves the gradient point"):
        optim.mechanic(optim.sf_adamw())
    with pytest.raises(ValueError, match="positive scale"):
        optim.mechanic(optim.adamw(), s_init=0.0)
