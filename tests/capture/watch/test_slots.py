"""Slots are found and read without running anybody's code."""

from __future__ import annotations

import collections
import contextvars
import os
import types
from typing import Any

import pytest
from torch import nn

from fusion_compile._capture.watch import slots
from fusion_compile._capture.watch.slots import ABSENT, CELL, Slot, attribute_slots, instance_dict, item_slot


class Base:
    inherited = 1

    @property
    def computed(self) -> int:
        raise AssertionError("a property was evaluated")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("__getattr__ was called")


class Derived(Base):
    own = 2

    def __init__(self) -> None:
        self.here = 3


class WithSlots:
    __slots__ = ("filled", "unset")

    def __init__(self) -> None:
        self.filled = 4


def read(value: Any, name: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    found = attribute_slots(value, name, "x")
    return [(slot.holder, slot.value()) for slot in found], [slot.label for slot in found]


def test_an_instances_attribute_lies_in_its_dictionary() -> None:
    value = Derived()
    assert read(value, "here") == ([(vars(value), 3)], ["x.here"])


def test_a_class_attribute_depends_on_the_instance_too() -> None:
    value = Derived()
    assert read(value, "own") == ([(vars(value), ABSENT), (Derived, 2)], ["x.own", "Derived.own"])
    assert read(value, "inherited") == ([(vars(value), ABSENT), (Base, 1)], ["x.inherited", "Base.inherited"])


def test_what_is_computed_is_no_slot_and_is_not_computed() -> None:
    value = Derived()
    assert read(value, "computed") == ([], [])
    assert read(value, "unknown") == ([(vars(value), ABSENT)], ["x.unknown"])


def test_declared_slots() -> None:
    value = WithSlots()
    assert read(value, "filled") == ([(value, 4)], ["x.filled"])
    assert read(value, "unset") == ([(value, ABSENT)], ["x.unset"])


def test_classes_and_modules() -> None:
    assert read(Derived, "inherited") == ([(Base, 1)], ["x.inherited"])
    assert read(slots, "CELL") == ([(vars(slots), CELL)], ["x.CELL"])


def test_a_metaclass_has_attributes_too() -> None:
    class Meta(type):
        shared = 5

    assert read(Meta("Made", (), {}), "shared") == ([(Meta, 5)], ["x.shared"])


def test_a_modules_parameters_buffers_and_children() -> None:
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm)
    assert read(norm, "weight")[0][0][0] is norm._parameters
    assert read(norm, "running_mean")[0][0][0] is norm._buffers
    assert read(model, "0")[0] == [(model._modules, norm)]


@pytest.mark.parametrize("value", [{"a": 1}, collections.OrderedDict(a=1), collections.defaultdict(int, a=1)])
def test_items_of_dictionaries(value: Any) -> None:
    slot = item_slot(value, "a", "x")
    assert slot is not None and slot.holder is value and slot.value() == 1 and slot.label == "x['a']"
    absent = item_slot(value, "b", "x")
    assert absent is not None and absent.value() is ABSENT and list(value) == ["a"]


def test_items_of_sequences_and_of_module_containers() -> None:
    children = nn.Sequential(nn.ReLU(), nn.Tanh())
    last = item_slot(children, -1, "x")
    assert last is not None and last.value() is children[1] and last.holder is children._modules
    assert item_slot(children, 2, "x") is None
    beyond = item_slot([1], 3, "x")
    assert beyond is not None and beyond.value() is ABSENT


def test_a_class_that_computes_items_has_no_slots_for_them() -> None:
    class Computes(dict):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            raise AssertionError("__getitem__ was called")

    assert item_slot(Computes(a=1), "a", "x") is None


def test_cells_context_variables_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Slot(types.CellType(5), CELL, "x").value() == 5
    assert Slot(types.CellType(), CELL, "x").value() is ABSENT
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    assert Slot(variable, None, "x").value() is ABSENT
    monkeypatch.setenv("FUSION_COMPILE_TEST", "6")
    assert Slot(os.environ, "FUSION_COMPILE_TEST", "x").value() == "6"


def test_two_slots_that_are_one_have_one_identity() -> None:
    holder = {"a": 1}
    assert Slot(holder, "a", "x").identity == Slot(holder, "a", "y").identity != Slot({"a": 1}, "a", "x").identity


def test_an_object_without_a_dictionary_has_none() -> None:
    assert instance_dict(WithSlots()) is None and instance_dict(3) is None
