"""The private torch API that numbers need does what is relied on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusion_compile._capture.numbers import _compat


def test_a_fake_mode_shows_each_operator_once_and_no_inner_ones() -> None:
    seen: list[Any] = []
    mode = _compat.SeenFakeMode(lambda func, args, kwargs, out: seen.append((str(func), tuple(out.shape))))
    x = mode.from_tensor(torch.ones(2, 3))
    with mode:
        torch.nn.functional.gelu(x).sum()
    assert seen == [("aten.gelu.default", (2, 3)), ("aten.sum.default", ())]


def test_equal_numbers_get_different_symbols_and_one_is_not_special() -> None:
    env = _compat.SeenFakeMode(lambda *_: None).shape_env
    a, b, t = (_compat.new_symbol(env, v, name) for v, name in ((1, "a"), (1, "b"), (-0.5, "t")))
    assert len({_compat.expression_of(s) for s in (a, b, t)}) == 3
    assert [_compat.hint_of(s) for s in (a, b, t)] == [1, 1, -0.5]
    assert _compat.node_of(a) is _compat.node_of(a)


def test_guards_are_seen_and_given_away_aside() -> None:
    env: Any = _compat.SeenFakeMode(lambda *_: None).shape_env
    n = _compat.new_symbol(env, 3, "n")
    asked: list[Any] = []
    with _compat.guards_seen(env, lambda node, outcome: asked.append(bool(outcome)), lambda: False) as others:
        assert bool(n < 5)
    with _compat.guards_seen(env, lambda node, outcome: asked.append(outcome), lambda: True):
        assert int(n) == 3
    assert asked == [True] and others == [] and len(env.guards) == 1


def test_arguments_have_the_names_and_types_of_the_schema() -> None:
    given = _compat.given(torch.ops.aten.add.Tensor, (1, 2), {"alpha": 3})
    assert given == [("self", "Tensor", 1), ("other", "Tensor", 2), ("alpha", "number", 3)]
    assert _compat.leaves([1, {"a": (2, 3)}]) == [1, 2, 3]


@pytest.fixture
def probed_anew() -> Iterator[None]:
    _compat.why_numbers_cannot_be_followed.cache_clear()
    yield
    _compat.why_numbers_cannot_be_followed.cache_clear()


def test_this_torch_can_follow_numbers() -> None:
    assert _compat.why_numbers_cannot_be_followed() == ""


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("name", ["create_symbol", "evaluate_sym_node", "create_symintnode"])
def test_a_torch_without_what_symbols_need_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ShapeEnv, name)
    assert _compat.why_numbers_cannot_be_followed().startswith(f"this torch ({torch.__version__}) has other symbolic")


@pytest.mark.usefixtures("probed_anew")
def test_a_torch_that_answers_out_of_sight_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShapeEnv, "evaluate_sym_node", lambda self, node, *_, **__: node.hint)
    monkeypatch.setattr(torch.SymInt, "__lt__", lambda self, other: True)
    monkeypatch.setattr(torch.SymInt, "__gt__", lambda self, other: False)
    assert _compat.why_numbers_cannot_be_followed().endswith("answers for symbolic numbers out of sight")


def test_data() -> None:
    mode = _compat.SeenFakeMode(lambda *_: None)
    assert _compat.has_data(torch.ones(2))
    assert not _compat.has_data(mode.from_tensor(torch.ones(2)))
