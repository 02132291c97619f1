"""Holders are read and put back in place, without a call of user code."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import types
from typing import Any

import pytest
import torch

from fusion_compile._capture.rehearsal.slots import MISSING, WHOLE, Holder, HolderKind, Slot, read, write


class Hostile(dict):  # type: ignore[type-arg]
    """Every method that a careless reader would call raises."""

    def _raise(self, *args: Any) -> Any:
        raise AssertionError("user code was called")

    __len__ = __iter__ = __getitem__ = __setitem__ = __delitem__ = __contains__ = __eq__ = _raise  # type: ignore[assignment]
    items = keys = values = get = pop = clear = update = _raise  # type: ignore[assignment]


def cell_of(value: Any) -> types.CellType:
    return types.CellType(value)


@dataclasses.dataclass(slots=True)
class Slotted:
    number: int = 1


def holder(value: Any, kind: HolderKind, keys: tuple[Any, ...] = ()) -> Holder:
    return Holder(value, kind, "held", keys)


def test_a_dictionary_is_put_back_in_place_and_in_order() -> None:
    held = holder({"a": 1, "b": 2, "c": 3}, HolderKind.DICT)
    before = held.items()
    del held.value["a"]
    held.value["d"] = held.value["b"] = 4
    held.put(before)
    assert list(held.value.items()) == [("a", 1), ("b", 2), ("c", 3)]


def test_an_ordered_dictionary_keeps_its_own_order() -> None:
    held = holder(collections.OrderedDict(a=1, b=2), HolderKind.DICT)
    before = held.items()
    held.value.move_to_end("a")
    held.value["c"] = 3
    held.put(before)
    assert list(held.value) == ["a", "b"] and list(reversed(held.value)) == ["b", "a"]


def test_overridden_methods_are_not_called() -> None:
    hostile = Hostile()
    dict.__setitem__(hostile, "a", 1)
    held = holder(hostile, HolderKind.DICT)
    before = held.items()
    dict.__setitem__(hostile, "a", 2)
    dict.__setitem__(hostile, "b", 2)
    held.put(before)
    assert list(dict.items(hostile)) == [("a", 1)] and read(Slot(hostile, "a", "")) == 1


@pytest.mark.parametrize(
    ("value", "kind", "change"),
    [
        ([1, 2], HolderKind.LIST, lambda v: v.append(3)),
        (collections.deque([1, 2], maxlen=2), HolderKind.DEQUE, lambda v: v.append(3)),
        ({1, 2}, HolderKind.SET, lambda v: v.add(3)),
    ],
)
def test_sequences_are_put_back_in_place(value: Any, kind: HolderKind, change: Any) -> None:
    held, copy = holder(value, kind), type(value)(value)
    before = held.items()
    change(value)
    assert list(value) != list(copy)
    held.put(before)
    assert held.value is value and list(value) == list(copy)


def test_a_deque_keeps_its_length_limit() -> None:
    held = holder(collections.deque([1, 2], maxlen=2), HolderKind.DEQUE)
    before = held.items()
    held.value.append(3)
    held.put(before)
    held.value.append(4)
    assert list(held.value) == [2, 4]


class Kept:
    value = 1


@pytest.mark.parametrize(
    ("slot", "other"),
    [
        (Slot(cell_of(1), None, ""), 2),
        (Slot({"k": 1}, "k", ""), 2),
        (Slot([1, 5], 0, ""), 2),
        (Slot(collections.deque([1, 5]), 0, ""), 2),
        (Slot(Kept, "value", ""), 2),
        (Slot(Slotted(), vars(Slotted)["number"], ""), 2),
        (Slot([1, 5], WHOLE, ""), [3, 4, 5]),
    ],
)
def test_what_is_written_is_read(slot: Slot, other: Any) -> None:
    first = read(slot)
    write(slot, other)
    assert read(slot) == other
    write(slot, first)
    assert read(slot) == first


@pytest.mark.parametrize(
    "slot",
    [
        Slot(cell_of(1), None, ""),
        Slot({"k": 1}, "k", ""),
        Slot(type("Empty", (), {"value": 1}), "value", ""),
        Slot(Slotted(), vars(Slotted)["number"], ""),
    ],
)
def test_a_slot_can_be_taken_away(slot: Slot) -> None:
    write(slot, MISSING)
    assert read(slot) is MISSING


def test_a_context_variable_without_a_value_is_missing() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    assert read(Slot(variable, None, "")) is MISSING
    write(Slot(variable, None, ""), 3)
    assert variable.get() == 3


def test_the_gradient_of_a_tensor_inside_a_graph_is_not_asked_for() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert read(Slot(leaf * 2, "grad", "")) is None  # torch would warn
    leaf.grad = torch.ones(2)
    assert read(Slot(leaf, "grad", "")) is leaf.grad


def test_hooks_of_a_tensor_are_taken_away() -> None:
    leaf, calls = torch.ones(2, requires_grad=True), []
    leaf.register_hook(calls.append)
    write(Slot(leaf, "_backward_hooks", ""), None)
    leaf.sum().backward()
    assert calls == []


def test_kept_slots_are_left_as_they_are() -> None:
    held = holder({"a": 1, "b": 2}, HolderKind.DICT)
    before = held.items()
    held.value.update(a=3, b=4, c=5)
    held.put(before, {Slot(held.value, "b", "").identity, Slot(held.value, "c", "").identity})
    assert held.value == {"a": 1, "b": 4, "c": 5}


def test_labels() -> None:
    attributes = Holder({}, HolderKind.DICT, "model.1", attributes=True)
    table = Holder({}, HolderKind.DICT, "model.1.table")
    assert attributes.label_of("mean") == "model.1.mean"
    assert [table.label_of(key) for key in (5, "a", (2, "b"), torch.float32)] == [
        *("model.1.table[5]", "model.1.table['a']", "model.1.table[(2, 'b')]", "model.1.table[<dtype>]")
    ]
    assert Holder(cell_of(1), HolderKind.CELL, "loss_fn<queue>").label_of(None) == "loss_fn<queue>"
