"""An expression gives what Python gives, with Python's rounding, for any numbers."""

from __future__ import annotations

import math

import pytest

from fusion_compile._capture.numbers.expressions import MOST_CHARACTERS, apply, can_apply, constant, number

N, T = number(0, "n"), number(1, "t")


def test_arithmetic_keeps_its_order() -> None:
    total = apply("sub", apply("add", T, 0.1), T)
    assert total((0, 0.3)) == (0.3 + 0.1) - 0.3 != 0.1


def test_floor_division_is_pythons() -> None:
    assert apply("floordiv", T, 0.1)((0, 1.0)) == 9.0


@pytest.mark.parametrize("value", [-7, 0, 23, 10**30])
def test_a_pointer_goes_around(value: int) -> None:
    assert apply("mod", apply("add", N, 8), 24)((value, 0.0)) == (value + 8) % 24


def test_functions() -> None:
    assert apply("floor", T)((0, -0.5)) == -1
    assert apply("trunc", T)((0, -0.5)) == 0
    assert apply("round", T, 1)((0, 0.25)) == round(0.25, 1)
    assert type(apply("float", N)((3, 0.0))) is float
    assert apply("and", N, 6)((3, 0.0)) == 2


def test_a_constant_and_its_inputs() -> None:
    assert constant(3)(()) == 3
    assert constant("a")(()) == "a"
    assert apply("lt", apply("add", N, 1), T).inputs() == {0, 1}
    assert constant(3).inputs() == set()


def test_a_division_by_zero_is_pythons_error() -> None:
    with pytest.raises(ZeroDivisionError):
        apply("truediv", 1, N)((0, 0.0))


def test_text() -> None:
    assert str(apply("le", apply("mod", apply("add", N, 8), 24), apply("neg", T))) == "((n + 8) % 24) <= neg(t)"


def test_long_chains_need_no_recursion() -> None:
    at = N
    for _ in range(5000):
        at = apply("add", at, 1)
    assert at((0, 0.0)) == 5000
    assert at.inputs() == {0}
    assert len(str(at)) < 4 * MOST_CHARACTERS


def test_known_operations() -> None:
    assert can_apply("add") and can_apply("floor") and not can_apply("divmod")
    assert apply("trunc", T)((0, 2.9)) == math.trunc(2.9)
