"""Plain numbers that a captured step counts on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._step.counted import CountedNumbers, count_numbers, operand_sentence
from fusion_compile._step.operands import NotAnOperand

CPU = torch.device("cpu")


def counted(run: Callable[[dict[str, Any], Any], Any], **values: Any) -> tuple[dict[str, Any], CountedNumbers]:
    """What is found out of `run`, which gets the numbers and a tensor ``[2]``."""
    start = dict(values)

    def on_fakes(mode: Any) -> None:
        with mode:
            run(values, mode.from_tensor(torch.ones(2)))

    slots = [Slot(values, name, name) for name in values]
    found = count_numbers(slots, on_fakes, lambda: values.update(start), CPU)
    assert values == start
    return values, found


def test_no_number_fits_always() -> None:
    none = count_numbers([], lambda mode: None, lambda: None, CPU)
    none.count_on()
    assert none.fit() and none.given((1,)) == (1,) and none.followed(abs) is abs


def test_a_number_that_decides_nothing_is_counted_on() -> None:
    def run(values: dict[str, Any], x: Any) -> None:
        values["n"] += 2

    values, found = counted(run, n=1)
    found.count_on()
    assert values == {"n": 3} and found.fit() and found.operands is None


def test_a_number_with_a_threshold_fits_until_then() -> None:
    def run(values: dict[str, Any], x: Any) -> None:
        values["n"] += 1
        x.sin() if values["n"] > 2 else x.cos()

    values, found = counted(run, n=0)
    assert found.fit()
    values["n"] = 2
    assert not found.fit()


def test_a_number_in_arithmetic_is_given_as_a_tensor() -> None:
    def run(values: dict[str, Any], x: Any) -> Any:
        values["n"] += 1
        return x * (values["n"] / 4)

    values, found = counted(run, n=0)
    assert found.given(())[0][0].tolist() == [0.25]
    found.count_on()
    assert found.given(())[0][0].tolist() == [0.5]

    def advance(state: Any, given: tuple[Any, ...]) -> Any:
        assert given == ("batch",)
        return run(values, torch.ones(2))

    followed = found.followed(advance)
    assert followed({}, ("batch", [torch.tensor([9.0])])).tolist() == [9.0, 9.0]


def test_a_number_that_decides_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n \(1\) decides a shape, a position or how an operator computes"):
        counted(lambda values, x: (values.update(n=values["n"] + 1), x.repeat(values["n"])), n=1)


def test_a_part_of_a_tensor_may_grow_until_it_is_the_whole() -> None:
    def run(values: dict[str, Any], x: Any) -> None:
        values["n"] += 1
        x[: values["n"]].sum()

    values, found = counted(run, n=0)
    found.count_on()
    assert values == {"n": 1} and not found.fit()
    values, found = counted(run, n=2)
    found.count_on()
    assert values == {"n": 3} and found.fit()
    values.update(n=50)
    assert found.fit()
    values.update(n=0)
    assert not found.fit()


def test_the_refusal_of_an_operand_names_the_numbers() -> None:
    _, found = counted(lambda values, x: values.update(n=values["n"] + 1), n=1)
    why = str(NotAnOperand("pow takes no tensor there"))
    assert operand_sentence(found, why).startswith(
        "n (1): changes at each step and is used in arithmetic on tensors, but pow takes no tensor there."
    )
