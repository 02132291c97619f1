"""Numbers that have few values, one after the other, and programs that compute something else each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusion_compile._capture.numbers.comes_back import come_back, computes_otherwise_each_time
from fusion_compile._capture.python_state.slots import Slot

Body = Callable[[dict[str, Any], torch.Tensor], object]


def given(body: Body, values: dict[str, Any]) -> tuple[Callable[[Any], None], list[Slot], Callable[[], None]]:
    start = dict(values)

    def on_fakes(mode: Any) -> None:
        with mode:
            body(values, mode.from_tensor(torch.ones(16)))

    return on_fakes, [Slot(values, name, name) for name in values], lambda: values.update(start)


def back(body: Body, at_most: int = 8, **values: Any) -> bool:
    run, slots, restore = given(body, values)
    found = come_back(run, slots, range(len(slots)), restore, at_most)
    assert {slot.label: values[slot.label] for slot in slots} == values
    return found


def around(values: dict[str, Any], x: torch.Tensor) -> None:
    values["n"] = (values["n"] + 4) % 16


def test_a_pointer_around_a_short_queue_comes_back() -> None:
    assert back(around, n=0)
    assert back(around, at_most=4, n=0)
    assert not back(around, at_most=3, n=0)


def test_a_counter_does_not() -> None:
    assert not back(lambda values, x: values.update(n=values["n"] + 1), n=0)


def test_what_becomes_a_number_counts_as_one_value() -> None:
    assert back(lambda values, x: values.update(n=0.5 if values["n"] is None else values["n"] * 0.5), n=None)


def test_what_becomes_an_object_does_not_come_back() -> None:
    assert not back(lambda values, x: values.update(n=x.sum()), n=0)


def test_parts_that_grow_are_another_program_each_time_until_they_stop() -> None:
    def grows(values: dict[str, Any], x: torch.Tensor) -> None:
        values["n"] += 1
        x[: values["n"]].sum()

    def stops(values: dict[str, Any], x: torch.Tensor) -> None:
        values["n"] += 1
        x[: min(values["n"], 3)].sum()

    assert computes_otherwise_each_time(*given(grows, {"n": 0}), at_most=8)
    assert not computes_otherwise_each_time(*given(stops, {"n": 0}), at_most=8)
