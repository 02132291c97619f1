"""A slot of every kind can be read, written and put back."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

from fusion_compile._capture.numbers.number_slots import is_plain, read_slot, slots_kept, write_slot


class Trainer:
    steps = 3


class Slotted:
    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 3


@dataclass(frozen=True)
class Frozen:
    steps: int = 3


def cell_of(value: int) -> types.CellType:
    return (lambda: value).__closure__[0]  # type: ignore[index]


def module() -> nn.Module:
    made = nn.Linear(1, 1)
    made.steps = 3  # type: ignore[assignment]
    return made


HOLDERS: dict[str, tuple[Any, Any]] = {
    "dictionary": ({"steps": 3}, "steps"),
    "list": ([0, 3], 1),
    "cell": (cell_of(3), None),
    "class": (Trainer, "steps"),
    "slots": (Slotted(), "steps"),
    "frozen": (Frozen(), "steps"),
    "module": (module(), "steps"),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_slot_is_written_and_gets_back_what_it_held(kind: str) -> None:
    holder, key = HOLDERS[kind]
    with slots_kept([(holder, key)]) as values:
        write_slot(holder, key, 4)
        assert read_slot(holder, key) == 4
    assert values == [3]
    assert read_slot(holder, key) == 3


def test_slots_are_put_back_after_an_error() -> None:
    held = {"steps": 3}
    with pytest.raises(ZeroDivisionError), slots_kept([(held, "steps")]):
        held["steps"] = 1 // 0
    assert held == {"steps": 3}


def test_plain_values() -> None:
    assert all(map(is_plain, (1, 0.5, True, "a", None)))
    assert not any(map(is_plain, ([], object(), nn.Linear)))


def test_an_empty_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        read_slot({}, "steps")
