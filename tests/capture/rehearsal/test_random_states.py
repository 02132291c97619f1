"""States of generators are compared and put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fusion_compile._capture.rehearsal.random_states import RandomStates

OWN: list[tuple[Any, Callable[[Any], float]]] = [
    (torch.Generator().manual_seed(3), lambda g: float(torch.rand((), generator=g))),
    (random.Random(3), lambda g: float(g.gauss(0, 1))),  # keeps every second number inside
    (np.random.default_rng(3), lambda g: float(g.normal())),
    (np.random.RandomState(3), lambda g: float(g.normal())),
]
GLOBAL: list[tuple[str, Callable[[], float]]] = [
    ("torch's generator of the CPU", lambda: float(torch.rand(()))),
    ("Python's generator (random)", random.random),
    ("numpy's generator (numpy.random)", lambda: float(np.random.rand())),
]


@pytest.mark.parametrize(("generator", "draw"), OWN, ids=lambda value: type(value).__name__)
def test_an_own_generator_draws_the_same_again(generator: Any, draw: Callable[[Any], float]) -> None:
    draw(generator)
    states = RandomStates([("own", generator)])
    assert states.moved() == []
    drawn = [draw(generator) for _ in range(3)]
    assert states.moved() == ["own"]
    assert states.moved_outside_torch() is not isinstance(generator, torch.Generator)
    states.restore()
    assert states.moved() == [] and [draw(generator) for _ in range(3)] == drawn


@pytest.mark.parametrize(("label", "draw"), GLOBAL, ids=[label for label, _ in GLOBAL])
def test_a_global_generator_draws_the_same_again(label: str, draw: Callable[[], float]) -> None:
    states = RandomStates()
    drawn = draw()
    assert states.moved() == [label]
    states.restore()
    assert draw() == drawn


def test_the_operating_systems_generator_has_no_state() -> None:
    states = RandomStates([("system", random.SystemRandom())])
    random.SystemRandom().random()
    assert states.moved() == []
