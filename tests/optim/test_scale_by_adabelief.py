"""AdaBelief against its twin, and the laws."""

from functools import partial

import torch

from fusion_compile import optim
from tests.data.bowl import SHAPES
from tests.optim.walks import distance, keeps_the_laws
from tests.oracles.adam_variants import AdaBelief


def test_it_follows_its_twin() -> None:
    whole = optim.chain(optim.scale_by_adabelief((0.9, 0.99), 1e-6), optim.scale_by_learning_rate(1e-3))
    twin = partial(AdaBelief, betas=(0.9, 0.99), eps=1e-6)
    assert distance(whole, twin, torch.float64, tuple(SHAPES)) <= 1e-9


def test_laws() -> None:
    whole = optim.chain(optim.scale_by_adabelief(), optim.scale_by_learning_rate(1e-3))
    keeps_the_laws(whole, {"scalar/b": torch.randn(7, dtype=torch.float64)})
