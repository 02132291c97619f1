"""One slot is read, written and taken away."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import os
import types
from typing import Any

import pytest
import torch

from fusion_compile._capture.python_state.slots import (
    MISSING,
    WHOLE,
    Slot,
    key_identity,
    named_key,
    read,
    refill,
    slots_kept,
    values_in,
    write,
)


def cell_of(value: Any) -> types.CellType:
    return types.CellType(value)


@dataclasses.dataclass(slots=True)
class Slotted:
    number: int = 1


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
    leaf = torch.ones(2, requires_grad=True)
    calls: list[Any] = []
    leaf.register_hook(calls.append)
    write(Slot(leaf, "_backward_hooks", ""), None)
    leaf.sum().backward()
    assert calls == []


@pytest.mark.parametrize(
    "slot",
    [
        Slot({"steps": 3}, "steps", ""),
        Slot([0, 3], 1, ""),
        Slot(cell_of(3), None, ""),
        Slot(type("Trainer", (), {"steps": 3}), "steps", ""),
        Slot(Slotted(3), vars(Slotted)["number"], ""),
    ],
)
def test_a_slot_gets_back_what_it_held(slot: Slot) -> None:
    with slots_kept([slot]) as values:
        write(slot, 4)
        assert read(slot) == 4
    assert values == [3] and read(slot) == 3


def test_slots_get_back_what_they_held_after_an_error() -> None:
    held = {"steps": 3}
    with pytest.raises(ZeroDivisionError), slots_kept([Slot(held, "steps", ""), Slot(held, "later", "")]):
        held.update(steps=4, later=1 // 0)
    assert held == {"steps": 3}
    with slots_kept([Slot(held, "later", "")]) as values:
        held["later"] = 1
    assert values == [MISSING] and held == {"steps": 3}


@pytest.mark.parametrize(
    "slot", [Slot([], 0, ""), Slot([], -1, ""), Slot((), 3, ""), Slot({}, [], ""), Slot({}, "k", "")]
)
def test_what_no_container_holds_is_missing(slot: Slot) -> None:
    assert read(slot) is MISSING


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_COMPILE_TEST", "6")
    assert read(Slot(os.environ, "FUSION_COMPILE_TEST", "")) == "6"
    monkeypatch.delenv("FUSION_COMPILE_TEST")
    assert read(Slot(os.environ, "FUSION_COMPILE_TEST", "")) is MISSING


def test_two_slots_that_are_one_have_one_identity() -> None:
    holder = {"a": 1}
    assert Slot(holder, "a", "x").identity == Slot(holder, "a", "y").identity != Slot({"a": 1}, "a", "x").identity
    assert Slot([], 1, "").identity[1] != Slot([], True, "").identity[1]


@pytest.mark.parametrize("container", [[3, 1], collections.deque([3, 1], maxlen=2), {3, 1}])
def test_a_container_is_filled_in_place(container: Any) -> None:
    refill(container, iter([5, 4]))
    assert container == type(container)([5, 4]) and set(values_in(container)) == {4, 5}


def test_a_container_with_keys_is_not_filled_with_values() -> None:
    held = {"a": 1}
    with pytest.raises(AssertionError, match="A dict has keys"):
        refill(held, [2])
    assert held == {"a": 1} and values_in(held) == [1]


def test_a_keys_identity_asks_no_user_code() -> None:
    class Hostile:
        def __hash__(self) -> int:
            raise AssertionError("user code was called")

    key = Hostile()
    assert key_identity(key) == key_identity(key) != key_identity(Hostile())
    assert key_identity(1) != key_identity(1.0) and key_identity("a" * 50) == key_identity("a" * 50)


def test_keys_are_named_as_code_writes_them() -> None:
    assert [named_key(key) for key in ("a", 2, (1, "b"), Kept())] == ["'a'", "2", "(1, 'b')", "<Kept>"]
