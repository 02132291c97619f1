"""Symbols stand in slots during a run, are plain numbers to user code, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._capture.numbers import _compat
from fusion_compile._capture.numbers.expressions import number
from fusion_compile._capture.numbers.symbols import Condition, as_user_sees_it, is_plain, same_number, with_symbols
from fusion_compile._capture.python_state.slots import MISSING, Slot
from tests.capture.counting_program import Counting, X, counted


def mode() -> Any:
    return _compat.SeenFakeMode(lambda *_: None)


def test_a_graph_traced_under_symbols_takes_the_number_as_an_input() -> None:
    model = Counting(counted(lambda m, h: h * min(1.0, m.n / 4)), n=0)
    fakes = mode()
    with with_symbols([Slot(vars(model), "n", "n")], fakes.shape_env) as symbols:

        def step(x: Any, n: Any) -> Any:
            vars(model)["n"] = n
            return model(x)

        with fakes:
            graph = make_fx(step, _allow_non_fake_inputs=True)(fakes.from_tensor(X), symbols.numbers[0])
    assert model.n == 0
    assert [str(c) for c in symbols.conditions] == ["((n + 1) / 4) < 1.0"]
    for n in (0, 1, 2):
        vars(model)["n"] = n
        assert torch.equal(graph(X, n), model(X))


def test_user_code_takes_symbols_for_plain_numbers() -> None:
    held = {"n": 3, "t": 0.5}
    with with_symbols([Slot(held, "n", "n"), Slot(held, "t", "t")], mode().shape_env) as symbols:
        n, t = symbols.numbers
        assert isinstance(n, int) and isinstance(n + 1, int) and isinstance(t * n, float) and isinstance(n > 2, bool)
        assert not isinstance(n, float) and not isinstance(t, int)
        assert isinstance(n, torch.SymInt) and isinstance(n / 2, torch.SymFloat)
    assert symbols.conditions == [] and symbols.riddles == []
    assert held == {"n": 3, "t": 0.5}


def test_texts_and_hashes_are_riddles() -> None:
    held = {"n": 3}
    with with_symbols([Slot(held, "n", "n")], mode().shape_env) as symbols:
        assert f"{held['n'] + 1}" == "4"
        with pytest.raises(TypeError, match="a key of a dictionary"):
            {held["n"]: 1}
    assert [(r.what, r.inputs) for r in symbols.riddles] == [
        ("its text is used", frozenset({0})),
        ("it is a key of a dictionary, a set or a cache", frozenset({0})),
    ]
    assert all(r.where.startswith(__file__) for r in symbols.riddles)


def test_torchs_classes_are_as_they_were() -> None:
    before = [dict(vars(kind)) for kind in _compat.SYMBOLIC]
    held = {"n": 3}
    with pytest.raises(ZeroDivisionError), with_symbols([Slot(held, "n", "n")], mode().shape_env):
        raise ZeroDivisionError
    assert [dict(vars(kind)) for kind in _compat.SYMBOLIC] == before
    assert held == {"n": 3}


def test_only_the_chosen_slots_get_symbols() -> None:
    held = {"n": 3, "k": 4}
    with with_symbols([Slot(held, "n", "n"), Slot(held, "k", "k")], mode().shape_env, [1]) as symbols:
        assert type(held["n"]) is int
        assert bool(held["k"] > held["n"])
    assert [str(c) for c in symbols.conditions] == ["k > 3"]
    assert symbols.conditions[0].holds((0, 5)) and not symbols.conditions[0].holds((0, 3))


def test_reflected_operators_keep_their_order() -> None:
    held = {"n": 3}
    with with_symbols([Slot(held, "n", "n")], mode().shape_env) as symbols:
        found = [symbols.expression(v) for v in (10 - held["n"], 10 / held["n"], 10 % held["n"], 2 ** held["n"])]
    assert [str(e) for e in found] == ["10 - n", "10 / n", "10 % n", "2 ** n"]
    assert [e((4,)) for e in found if e is not None] == [6, 2.5, 2, 16]


def test_conditions_compare_type_and_value() -> None:
    assert Condition(number(0, "n"), 3, "").holds((3,))
    assert not Condition(number(0, "n"), 3, "").holds((3.0,))
    assert str(Condition(number(0, "n"), 3, "")) == "n == 3"
    assert same_number(0.1, 0.1) and not same_number(0.0, -0.0) and not same_number(1, True)


def test_a_plain_number_is_left_alone() -> None:
    assert as_user_sees_it(3) == 3


def test_plain_values() -> None:
    assert all(map(is_plain, (1, 0.5, True, "a", None)))
    assert not any(map(is_plain, ([], object(), MISSING)))
