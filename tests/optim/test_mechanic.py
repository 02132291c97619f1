"""Mechanic against its twin; it finds a scale from far below, and says what it cannot wrap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, distance, keeps_the_laws
from tests.oracles.adamw import AdamW
from tests.oracles.mechanic import Mechanic
from tests.oracles.protocol import Tensors
from tests.small_models import compiled, squared_error


def test_it_follows_its_twin() -> None:
    """Over 100 updates in float64. Δ is a difference of weights over S, so roundings of 1e-16 become 1e-10."""

    def twin(start: Tensors) -> Mechanic:
        return Mechanic(AdamW(start, lr=1.0, weight_decay=0.0))

    whole = optim.mechanic(optim.adamw(1.0, weight_decay=0.0))
    assert distance(whole, twin, torch.float64, tuple(SHAPES)) <= 1e-6


def test_a_relative_start_bounds_and_the_freeze_follow_the_twin() -> None:
    """The same 100 updates; S stands at its upper bound from the first ones on, and is kept after fifty."""
    options: dict[str, Any] = {"s_init": 3e-3, "relative": True, "bounds": (0.5, 6.0)}

    def twin(start: Tensors) -> Mechanic:
        return Mechanic(AdamW(start, lr=1.0, weight_decay=0.0), freeze=True, **options)

    whole = optim.mechanic(optim.adamw(1.0, weight_decay=0.0), freeze="auto", **options)
    assert distance(whole, twin, torch.float64, tuple(SHAPES)) <= 1e-6


def test_padding_of_a_bank_is_no_weight() -> None:
    model = nn.Linear(16, 3, bias=False)
    nn.init.ones_(model.weight)
    optimizer = optim.stored(optim.mechanic(optim.adamw(1.0), s_init=0.5, relative=True), mu="int8")
    step = compiled(model, squared_error, optimizer=optimizer, mode="eager")
    step(torch.ones(2, 16), torch.ones(2, 3))
    assert float(step.metrics["comp/mechanic_s"]) == 0.5


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
    with pytest.raises(ValueError, match="freeze='soon' is not known"):
        optim.mechanic(optim.adamw(), freeze="soon")
    with pytest.raises(ValueError, match="a share of the largest"):
        optim.mechanic(optim.adamw(), bounds=(0.5, 0.9))
