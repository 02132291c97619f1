"""Slots are found and read without running anybody's code."""

from __future__ import annotations

import collections
import threading
import types
from typing import Any

import pytest
from torch import nn

from fusion_compile._capture.python_state import attributes
from fusion_compile._capture.python_state.attributes import (
    attribute_slots,
    instance_dict,
    item_slot,
    set_instance_dict,
    slot_descriptors,
)
from fusion_compile._capture.python_state.slots import MISSING, read


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


def found_in(value: Any, name: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    found = attribute_slots(value, name, "x")
    return [(slot.holder, read(slot)) for slot in found], [slot.label for slot in found]


def test_an_instances_attribute_lies_in_its_dictionary() -> None:
    value = Derived()
    assert found_in(value, "here") == ([(vars(value), 3)], ["x.here"])


def test_a_class_attribute_depends_on_the_instance_too() -> None:
    value = Derived()
    assert found_in(value, "own") == ([(vars(value), MISSING), (Derived, 2)], ["x.own", "Derived.own"])
    assert found_in(value, "inherited") == ([(vars(value), MISSING), (Base, 1)], ["x.inherited", "Base.inherited"])


def test_what_is_computed_is_no_slot_and_is_not_computed() -> None:
    value = Derived()
    assert found_in(value, "computed") == ([], [])
    assert found_in(value, "unknown") == ([(vars(value), MISSING)], ["x.unknown"])


def test_declared_slots() -> None:
    value = WithSlots()
    assert found_in(value, "filled") == ([(value, 4)], ["x.filled"])
    assert found_in(value, "unset") == ([(value, MISSING)], ["x.unset"])


def test_classes_and_modules() -> None:
    assert found_in(Derived, "inherited") == ([(Base, 1)], ["x.inherited"])
    assert found_in(attributes, "MISSING") == ([(vars(attributes), MISSING)], ["x.MISSING"])


def test_a_metaclass_has_attributes_too() -> None:
    class Meta(type):
        shared = 5

    assert found_in(Meta("Made", (), {}), "shared") == ([(Meta, 5)], ["x.shared"])


def test_a_modules_parameters_buffers_and_children() -> None:
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm)
    assert found_in(norm, "weight")[0][0][0] is norm._parameters
    assert found_in(norm, "running_mean")[0][0][0] is norm._buffers
    assert found_in(model, "0")[0] == [(model._modules, norm)]


@pytest.mark.parametrize("value", [{"a": 1}, collections.OrderedDict(a=1), collections.defaultdict(int, a=1)])
def test_items_of_dictionaries(value: Any) -> None:
    slot = item_slot(value, "a", "x")
    assert slot is not None and slot.holder is value and read(slot) == 1 and slot.label == "x['a']"
    absent = item_slot(value, "b", "x")
    assert absent is not None and read(absent) is MISSING and list(value) == ["a"]


def test_items_of_sequences_and_of_module_containers() -> None:
    children = nn.Sequential(nn.ReLU(), nn.Tanh())
    last = item_slot(children, -1, "x")
    assert last is not None and read(last) is children[1] and last.holder is children._modules
    assert item_slot(children, 2, "x") is None
    beyond = item_slot([1], 3, "x")
    assert beyond is not None and read(beyond) is MISSING


def test_a_class_that_computes_items_has_no_slots_for_them() -> None:
    class Computes(dict):
        def __getitem__(self, key: Any) -> Any:
            raise AssertionError("__getitem__ was called")

    assert item_slot(Computes(a=1), "a", "x") is None


def test_a_slice_has_no_slot() -> None:
    assert item_slot([1, 2], slice(1), "x") is None


def test_a_threads_own_attributes() -> None:
    local = threading.local()
    local.a = 1
    assert instance_dict(local) == {"a": 1}


def test_a_dictionary_that_was_exchanged_is_put_back() -> None:
    value = Derived()
    before = vars(value)
    value.__dict__ = {"here": 5}
    set_instance_dict(value, before)
    assert vars(value) is before and value.here == 3


def test_slots_of_bases_count_and_a_namespaces_dictionary_does_not() -> None:
    class More(WithSlots):
        __slots__ = ("more",)

    assert [descriptor.__name__ for descriptor in slot_descriptors(More)] == ["more", "filled", "unset"]
    assert list(slot_descriptors(types.SimpleNamespace)) == []


def test_an_object_without_a_dictionary_has_none() -> None:
    assert instance_dict(WithSlots()) is None and instance_dict(3) is None
