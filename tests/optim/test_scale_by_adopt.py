"""Adopt against its twin."""

from functools import partial

import torch

from fusion_compile import optim
from tests.data.bowl import SHAPES
from tests.optim.walks import Walk, distance
from tests.oracles.adam_variants import Adopt


def test_it_follows_its_twin() -> None:
    whole = optim.chain(optim.scale_by_adopt((0.9, 0.99), 1e-6), optim.scale_by_learning_rate(1e-3))
    twin = partial(Adopt, betas=(0.9, 0.99), eps=1e-6)
    assert distance(whole, twin, torch.float64, tuple(SHAPES)) <= 1e-9


def test_the_first_update_moves_nothing_and_later_ones_are_bounded() -> None:
    walk = Walk(optim.scale_by_adopt((0.0, 0.999)), {"b": torch.zeros(2, dtype=torch.float64)})
    first = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    assert not bool(walk({"b": first})["b"].any())
    torch.testing.assert_close(walk({"b": torch.ones(2).double()})["b"], torch.ones(2).double())  # the bound at t = 1
