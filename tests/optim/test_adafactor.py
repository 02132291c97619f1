"""Adafactor against its twin and against torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fusion_compile import optim
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, distance, to_torch
from tests.oracles.adafactor import Adafactor
from tests.oracles.protocol import float64_copies
from tests.problems import BowlGradient, run_torch


def test_it_follows_its_twin() -> None:
    make = optim.adafactor(0.02, weight_decay=0.1)
    assert distance(make, partial(Adafactor, lr=0.02, weight_decay=0.1), torch.float64, tuple(SHAPES)) <= 1e-9


def test_it_is_torchs() -> None:
    """In float64 over 30 updates, decay included."""
    gradient = BowlGradient()
    params: dict[str, torch.Tensor] = {n: torch.nn.Parameter(p) for n, p in to_torch(gradient.start).items()}
    official = torch.optim.Adafactor(params.values(), lr=0.02, weight_decay=0.3)
    run_torch(params, official.step, range(1, 31), lambda update: None)
    walk = Walk(optim.adafactor(0.02, 0.3), to_torch(gradient.start))
    for update in range(1, 31):
        walk(to_torch(gradient(float64_copies(walk.params), update)))
    for name, p in params.items():
        torch.testing.assert_close(walk.params[name], p.detach(), rtol=1e-9, atol=1e-11)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must lie below 0"):
        optim.scale_by_adafactor(0.8)
    with pytest.raises(ValueError, match="lr"):
        optim.adafactor(-1.0)
