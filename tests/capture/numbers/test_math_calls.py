"""Functions of ``math`` on numbers that a step counts on."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from math import cos

import pytest
from torch import Tensor, nn

from fusion_compile._capture.numbers.expressions import OF_MATH
from fusion_compile._capture.numbers.math_calls import math_is_asked
from tests.small_models import batches, compiled, mlp, squared_error, torch_loop


def test_only_followed_numbers_are_asked_for_and_math_is_as_before() -> None:
    own = {name: getattr(math, name) for name in OF_MATH}
    asked: list[tuple[str, tuple[object, ...]]] = []

    def answer(name: str, arguments: tuple[object, ...]) -> object:
        asked.append((name, arguments))
        return NotImplemented if name == "math.sqrt" else "answered"

    with pytest.raises(ValueError, match="math domain error"), math_is_asked(lambda v: v == 4, answer):
        assert math.cos(4) == "answered" and math.pow(2, 4) == "answered"  # type: ignore[comparison-overlap]
        assert math.sqrt(4) == 2.0 and math.cos(0) == 1.0
        math.sqrt(-1)
    assert asked == [("math.cos", (4,)), ("math.pow", (2, 4)), ("math.sqrt", (4,))]
    assert {name: getattr(math, name) for name in OF_MATH} == own


WEIGHTS: dict[str, tuple[Callable[[int], float], int]] = {
    "cosine": (lambda n: 0.5 * (1 + math.cos(math.pi * n / 20)), 1),
    "exponential": (lambda n: math.exp(-n / 10), 1),
    "sigmoid": (lambda n: 1 / (1 + math.exp(-5 * (n / 10 - 0.5))), 1),
    "power": (lambda n: math.pow(0.9, n) + math.log(n, 2), 1),
    "branch on a cosine": (lambda n: 0.1 if math.cos(n) > 0 else 0.2, 2),
    "at least": (lambda n: max(0.1, math.cos(n / 3)), 2),
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


def test_a_function_imported_by_its_name_has_a_program_for_each_value() -> None:
    trainer = types.SimpleNamespace(steps=0)

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        trainer.steps += 1
        return squared_error(model, x, y) * cos(trainer.steps)

    step = compiled(mlp(), loss_fn)
    with pytest.warns(UserWarning, match="captured by running"):
        for batch in batches(2):
            step(*batch)
    assert len(step.programs) == 2
