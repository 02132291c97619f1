"""A holder's slots are all read and put back in place, without a call of user code."""

from __future__ import annotations

import collections
import copy
import functools
import types
from typing import Any

import pytest
import torch

from fusion_compile._capture.python_state.holders import Holder
from fusion_compile._capture.python_state.slots import WHOLE, Slot, read


class Hostile(dict):
    """Every method that a careless reader would call raises."""

    def _raise(self, *args: Any) -> Any:
        raise AssertionError("user code was called")

    __len__ = __iter__ = __getitem__ = __setitem__ = __delitem__ = __contains__ = __eq__ = _raise
    items = keys = values = get = pop = clear = update = _raise  # type: ignore[assignment]


def test_a_dictionary_is_put_back_in_place_and_in_order() -> None:
    held = Holder({"a": 1, "b": 2, "c": 3}, "held")
    before = held.items()
    del held.value["a"]
    held.value["d"] = held.value["b"] = 4
    held.put(before)
    assert list(held.value.items()) == [("a", 1), ("b", 2), ("c", 3)]


def test_an_ordered_dictionary_keeps_its_own_order() -> None:
    held = Holder(collections.OrderedDict(a=1, b=2), "held")
    before = held.items()
    held.value.move_to_end("a")
    held.value["c"] = 3
    held.put(before)
    assert list(held.value) == ["a", "b"] and list(reversed(held.value)) == ["b", "a"]


def test_overridden_methods_are_not_called() -> None:
    hostile = Hostile()
    dict.__setitem__(hostile, "a", 1)
    held = Holder(hostile, "held")
    before = held.items()
    dict.__setitem__(hostile, "a", 2)
    dict.__setitem__(hostile, "b", 2)
    held.put(before)
    assert list(dict.items(hostile)) == [("a", 1)] and read(Slot(hostile, "a", "")) == 1


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, 2], lambda v: v.append(3)),
        (collections.deque([1, 2], maxlen=2), lambda v: v.append(3)),
        ({1, 2}, lambda v: v.add(3)),
    ],
)
def test_sequences_are_put_back_in_place(value: Any, change: Any) -> None:
    held, copy = Holder(value, "held"), type(value)(value)
    before = held.items()
    change(value)
    assert list(value) != list(copy)
    held.put(before)
    assert held.value is value and list(value) == list(copy)


def test_a_deque_keeps_its_length_limit() -> None:
    held = Holder(collections.deque([1, 2], maxlen=2), "held")
    before = held.items()
    held.value.append(3)
    held.put(before)
    held.value.append(4)
    assert list(held.value) == [2, 4]


def test_kept_slots_are_left_as_they_are() -> None:
    held = Holder({"a": 1, "b": 2}, "held")
    before = held.items()
    held.value.update(a=3, b=4, c=5)
    held.put(before, {Slot(held.value, "b", "").identity, Slot(held.value, "c", "").identity})
    assert held.value == {"a": 1, "b": 4, "c": 5}


def test_labels() -> None:
    attributes = Holder({}, "model.1", ".k")
    table = Holder({}, "model.1.table")
    assert attributes.label_of("mean") == "model.1.mean"
    assert [table.label_of(key) for key in (5, "a", (2, "b"), torch.float32)] == [
        *("model.1.table[5]", "model.1.table['a']", "model.1.table[(2, 'b')]", "model.1.table[<dtype>]")
    ]
    assert Holder(types.CellType(1), "loss_fn<queue>").label_of(None) == "loss_fn<queue>"


class WithSlots:
    __slots__ = ("a",)
    a: int


class WithMoreSlots(WithSlots):
    __slots__ = ("b",)
    b: int


def made() -> WithMoreSlots:
    value = WithMoreSlots()
    value.a, value.b = 1, 2
    return value


CONTENTS = [
    ({"a": 1}, [("a", 1)]),
    ([5, 6], [(0, 5), (1, 6)]),
    ((5,), [(0, 5)]),
    (collections.deque([5]), [(0, 5)]),
    ({5}, [(5, 5)]),
    (types.CellType(5), [(None, 5)]),
    (functools.partial(print, 1, end=""), [("func", print), ("args", (1,)), ("keywords", {"end": ""})]),
    (made(), [("__class__", WithMoreSlots), (vars(WithMoreSlots)["b"], 2), (vars(WithSlots)["a"], 1)]),
]


@pytest.mark.parametrize(("value", "expected"), CONTENTS, ids=lambda value: type(value).__name__)
def test_what_a_holder_holds(value: Any, expected: list[tuple[Any, Any]]) -> None:
    assert Holder(value, "held").items() == expected


def test_what_python_writes_into_a_class_by_itself_is_not_in_it() -> None:
    class Bare:
        x: int
        y = 3

    held = Holder(Bare, "Bare")
    before = held.items()
    Bare.__annotations__  # noqa: B018
    copy.deepcopy(Bare())
    assert held.items() == before and ("y", 3) in before


def test_names_of_keys() -> None:
    assert Holder({}, "", ".k").label_of("p") == "p"
    assert Holder(made(), "x", ".k").label_of(vars(WithSlots)["a"]) == "x.a"
    assert Holder([], "x").label_of(0) == "x[0]"
    assert Holder([], "x").label_of(WHOLE) == "x"
    assert Holder({}, "the model's forward hook", "").label_of(3) == "the model's forward hook"
    assert Holder({}, "x").label_of(None) == "x[None]"
