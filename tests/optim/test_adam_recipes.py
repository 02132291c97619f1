"""ADOPT, AdaBelief and AdamP as recipes: their twins with decay, their codecs, their registry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim import Transform
from tests.data.bowl import SHAPES
from tests.optim.walks import distance
from tests.oracles.adam_variants import AdaBelief, AdamP, Adopt

RECIPES: dict[str, tuple[Callable[..., Transform], Any]] = {
    "adopt": (optim.adopt, partial(Adopt, eps=1e-6)),
    "adabelief": (optim.adabelief, AdaBelief),
    "adamp": (optim.adamp, AdamP),
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_follows_its_twin_with_decay(name: str) -> None:
    """100 updates in float64."""
    make, twin = RECIPES[name]
    options: dict[str, Any] = {"betas": (0.8, 0.99), "weight_decay": 0.1}
    if name == "adabelief":
        options["eps"] = 1e-6
    assert distance(make(**options), partial(twin, **options), torch.float64, tuple(SHAPES)) <= 1e-9


@pytest.mark.parametrize("name", RECIPES)
def test_codecs_and_names(name: str) -> None:
    whole = optim.create(name, momentum="int8", second_moment="int8")
    assert whole.name == name and whole.extras.stored == {"mu": "int8", "nu": "int8_companded"}
    with pytest.raises(ValueError, match="is a second moment"):
        optim.create(name, second_moment="4bit")
