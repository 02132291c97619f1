"""Functions of ``math`` and numpy, and conversions, on numbers that a step counts on."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from math import cos
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from fusion_compile._capture.numbers.expressions import OF_MATH, OF_NUMPY
from fusion_compile._capture.numbers.math_calls import Followed, calls_are_asked, converts
from tests.small_models import batches, compiled, mlp, squared_error, torch_loop


def followed(answer: Callable[[str, tuple[object, ...]], object]) -> Followed:
    """Every 4 is followed, and stands for 40."""
    return Followed(lambda v: type(v) is int and v == 4, lambda v: 40, answer)


def test_only_followed_numbers_are_asked_for_and_everything_is_as_before() -> None:
    own = {name: getattr(math, name) for name in OF_MATH}, {name: getattr(np, name) for name in OF_NUMPY}, cos
    asked: list[tuple[str, tuple[object, ...]]] = []

    def answer(name: str, arguments: tuple[object, ...]) -> object:
        asked.append((name, arguments))
        return NotImplemented if name == "math.sqrt" else "answered"

    with pytest.raises(ValueError, match="math domain error"), calls_are_asked(followed(answer)):
        assert math.cos(4) == math.pow(2, 4) == cos(4) == np.exp(4) == "answered"
        assert math.sqrt(4) == 2.0 and math.cos(0) == np.exp(0) == 1.0 and np.exp.nin == 1
        math.sqrt(-1)
    assert [name for name, _ in asked] == ["math.cos", "math.pow", "math.cos", "numpy.exp", "math.sqrt"]
    assert own == (
        {name: getattr(math, name) for name in OF_MATH},
        {name: getattr(np, name) for name in OF_NUMPY},
        cos,
    )


def test_conversions_are_asked_for_where_user_code_may_call_them() -> None:
    scope: dict[str, Any] = {}
    exec("def f(n):\n return float(n), int('3'), isinstance(n, int), issubclass(bool, int), int == type(3)", scope)
    assert converts(scope["f"].__code__.co_names, scope) and not converts(["float"], {"float": None})
    with calls_are_asked(followed(lambda name, arguments: f"{name} of {arguments}"), [scope]):
        assert scope["f"](4) == ("float of (4,)", 3, True, True, True)
    assert scope["f"](4) == (4.0, 3, True, True, True) and "float" not in scope


WEIGHTS: dict[str, tuple[Callable[[int], float], int]] = {
    "cosine": (lambda n: 0.5 * (1 + math.cos(math.pi * n / 20)), 1),
    "exponential": (lambda n: math.exp(-n / 10), 1),
    "sigmoid": (lambda n: 1 / (1 + math.exp(-5 * (n / 10 - 0.5))), 1),
    "power": (lambda n: math.pow(0.9, n) + math.log(n, 2), 1),
    "branch on a cosine": (lambda n: 0.1 if math.cos(n) > 0 else 0.2, 2),
    "at least": (lambda n: max(0.1, math.cos(n / 3)), 2),
    "by their names": (
        lambda n: 2 + cos(n) + float(n) / 100 + int(n * 0.3) + round(n * 0.12, 1) + math.floor(n / 3),
        1,
    ),
    "of numpy": (lambda n: float(np.exp(-n / 10) + np.minimum(1.0, n / 5)) if isinstance(n, int) else 0.0, 1),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_that_math_computes_from_a_counter_has_the_ordinary_loops_values(kind: str) -> None:
    weight, programs = WEIGHTS[kind]

    def counting() -> tuple[types.SimpleNamespace, Callable[..., Tensor]]:
        trainer = types.SimpleNamespace(steps=0)

        def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            trainer.steps += 1
            return squared_error(model, x, y) + weight(trainer.steps) * model(x).square().mean()

        return trainer, loss_fn

    data = batches(10)
    wanted = torch_loop(mlp(), data, counting()[1])
    trainer, loss_fn = counting()
    step = compiled(mlp(), loss_fn)
    with pytest.warns(UserWarning, match="captured by running"):
        losses = [float(step(*batch)) for batch in data]
    # fp32 sums of another order, over ten steps
    assert losses == pytest.approx([float(loss) for loss in wanted], rel=1e-5)
    assert (trainer.steps, len(step.programs)) == (10, programs)


def test_what_no_expression_describes_has_a_program_for_each_value() -> None:
    trainer = types.SimpleNamespace(steps=0)

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        trainer.steps += 1
        scale = float(trainer.steps)
        return squared_error(model, x, y) * (scale if type(scale) is float else 0.0)

    step = compiled(mlp(), loss_fn)
    with pytest.warns(UserWarning, match="captured by running"):
        for batch in batches(2):
            step(*batch)
    assert len(step.programs) == 2
