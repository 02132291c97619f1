"""Records say what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot
from fusion_compile._capture.rehearsal.left_behind import (
    Inputs,
    Kind,
    Left,
    initialised,
    is_table,
    tensors_of,
)
from fusion_compile._capture.rehearsal.provenance import Depends


class Opaque:
    pass


def test_inputs_are_recognised_by_memory() -> None:
    tensor = torch.ones(4)
    inputs = Inputs([tensor])
    assert tensor[1:].detach() in inputs
    assert tensor.clone() not in inputs and 1 not in inputs


def left(before: Any, after: Any, key: Any = "k") -> Left:
    slot = Slot({}, key, "model.k")
    return Left("model.k", slot, Kind.CACHE, before, after, after, (1,), Depends.NOTHING, kept=after)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (left(None, torch.ones(1)), True),
        (left(MISSING, {"a": torch.ones(1)}), True),
        (left([], [torch.ones(1)]), True),
        (left([1], [1, torch.ones(1)], WHOLE), True),
        (left(torch.ones(1), torch.ones(2)), False),
        (left(False, True), False),
        (left(None, 5), False),
    ],
)
def test_what_was_filled_from_nothing(record: Left, expected: bool) -> None:
    assert is_table(record) is expected


def test_tensors_are_found_in_objects() -> None:
    value = Opaque()
    value.inner = [torch.ones(1)]  # type: ignore[attr-defined]
    assert [id(t) for t in tensors_of(left(None, value))] == [id(value.inner[0])]  # type: ignore[attr-defined]


def test_an_initialisation_keeps_its_values() -> None:
    record = left(False, True)
    assert initialised(record).kind is Kind.INITIALISED_ONCE and initialised(record).after_first is True
