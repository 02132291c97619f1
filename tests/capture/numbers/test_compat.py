"""The private torch API that numbers need does what is relied on."""

from __future__ import annotations

from typing import Any

import torch

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
    env = _compat.SeenFakeMode(lambda *_: None).shape_env
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


def test_data() -> None:
    mode = _compat.SeenFakeMode(lambda *_: None)
    assert _compat.has_data(torch.ones(2))
    assert not _compat.has_data(mode.from_tensor(torch.ones(2)))
