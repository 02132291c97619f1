"""What lies in a container, and which values are alike."""

from __future__ import annotations

import collections
import functools
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fusion_compile._capture.watch.holders import Holder, contents, hooks_of, is_alike, slot_names


class WithSlots:
    __slots__ = ("a",)


class WithMoreSlots(WithSlots):
    __slots__ = ("b",)


def made() -> WithMoreSlots:
    value = WithMoreSlots()
    value.a, value.b = 1, 2
    return value


CONTENTS = [
    ({"a": 1}, {"a": 1}),
    ([5, 6], {0: 5, 1: 6}),
    (collections.deque([5]), {0: 5}),
    ({5, 6}, {None: frozenset({5, 6})}),
    (types.CellType(5), {"cell_contents": 5}),
    (types.CellType(), {}),
    (functools.partial(print, 1, end=""), {"func": print, "args": (1,), "keywords": {"end": ""}}),
    (made(), {"__class__": WithMoreSlots, "a": 1, "b": 2}),
]


@pytest.mark.parametrize(("container", "expected"), CONTENTS, ids=lambda value: type(value).__name__)
def test_contents(container: Any, expected: dict[Any, Any]) -> None:
    assert contents(container) == expected


def test_what_python_writes_into_a_class_by_itself_is_not_in_it() -> None:
    class Bare:
        x: int
        y = 3

    before = contents(Bare)
    Bare.__annotations__  # noqa: B018
    assert contents(Bare) == before and before["y"] == 3


def test_slots_of_bases_count_and_a_namespaces_dictionary_does_not() -> None:
    assert set(slot_names(made())) == {"a", "b"} and slot_names(types.SimpleNamespace()) == ()


def test_hooks_of_a_tensor() -> None:
    def first(gradient: Any) -> None: ...
    def second(parameter: Any) -> None: ...

    tensor = nn.Parameter(torch.ones(1))
    assert hooks_of(tensor) == ()
    tensor.register_hook(first)
    tensor.register_post_accumulate_grad_hook(second)
    assert hooks_of(tensor) == (first, second)


def test_a_set_and_a_tensors_hooks_differ_by_content() -> None:
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(print)
    active = {1}
    holders = [Holder(tensor, "t"), Holder(active, "s")]
    for holder in holders:
        holder.remember()
    assert [list(holder.differences()) for holder in holders] == [[], []]
    tensor.register_hook(repr)
    active.add(3)
    names = [holder.named(key) for holder in holders for key, _, _ in holder.differences()]
    assert names == ["t's gradient hook", "s"]


def test_differences_by_key() -> None:
    container: dict[str, Any] = {"kept": 1, "replaced": 2, "removed": 3}
    whole, one = Holder(container, "d"), Holder(container, "d", keys=("replaced",))
    for holder in (whole, one):
        holder.remember()
    container.update(replaced=20, added=4)
    del container["removed"]
    absent = Holder({}, "").held.get("x")
    assert absent is None
    found = [(key, repr(before), repr(after)) for key, before, after in whole.differences()]
    assert found == [("replaced", "2", "20"), ("removed", "3", "nothing"), ("added", "nothing", "4")]
    assert [key for key, _, _ in one.differences()] == ["replaced"]


def test_names_of_keys() -> None:
    assert Holder({}, "model.1", ".k").named("p") == "model.1.p"
    assert Holder({}, "", ".k").named("p") == "p"
    assert Holder([], "x").named(0) == "x[0]"
    assert Holder(set(), "x").named(None) == "x"
    assert Holder(types.CellType(), "x").named("cell_contents") == "x"


class Method:
    def method(self) -> None: ...


METHOD, TENSOR = Method(), torch.ones(1)
ALIKE = [
    (0.5, float("0.5")),
    (float("nan"), float("nan")),
    ("a" * 50, "a" * 50),
    ([1, {"a": (2.5,)}], [1, {"a": (2.5,)}]),
    ({1, 2}, {2, 1}),
    ([TENSOR], [TENSOR]),
    (np.ones(2), np.ones(2)),
    (METHOD.method, METHOD.method),
    (functools.partial(print, end=""), functools.partial(print, end="")),
]
UNLIKE = [
    (1, 1.0),
    (True, 1),
    (0.0, -0.0),
    ([1], (1,)),
    ([1], [1, 2]),
    ({"a": 1}, {"b": 1}),
    (torch.ones(1), torch.ones(1)),
    (nn.Tanh(), nn.Tanh()),
    (np.ones(2), np.ones(2, dtype=np.float32)),
    (Method().method, Method().method),
    (functools.partial(print, end=""), functools.partial(print, end="x")),
    (None, 0),
]


@pytest.mark.parametrize(("a", "b"), ALIKE)
def test_alike(a: Any, b: Any) -> None:
    assert is_alike(a, b)


@pytest.mark.parametrize(("a", "b"), UNLIKE)
def test_unlike(a: Any, b: Any) -> None:
    assert not is_alike(a, b)
