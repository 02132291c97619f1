"""Rows by the bits of a timestep, on the CPU and on the device."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._sampler.table.step_index import Look, StepIndex, UnknownTimestep


def index_of(*values: float, capacity: int = 2, most: int = 4) -> StepIndex:
    index = StepIndex(torch.zeros(2), capacity, most)
    for value in values:
        index.reserve(torch.full((2,), value))
    return index


def test_rows_are_given_in_order_and_found_by_value() -> None:
    index = index_of(1.0, 0.5)
    assert [index.row_of(torch.tensor(value)) for value in (1.0, 0.5, 0.25)] == [0, 1, None]
    assert index.look(torch.tensor([0.5, 0.5])) == Look(1, True, [0.5, 0.5])
    assert index.look(torch.tensor([0.25, 0.25])) == Look(None, True, [0.25, 0.25])
    assert index.look(torch.tensor([1.0, 0.5])) == Look(None, False, [1.0, 0.5])


def test_bits_decide_and_not_values() -> None:
    index = index_of(0.0)
    assert index.row_of(torch.tensor(-0.0)) is None


def test_room_doubles_and_then_the_least_recently_used_row_is_given_away() -> None:
    index = index_of(1.0, 2.0, 3.0, 4.0)
    assert (len(index), index.capacity) == (4, 4)
    assert index.look(torch.full((2,), 1.0)).row == 0  # used, so 2 is the oldest
    assert index.reserve(torch.full((2,), 5.0)) == 1
    assert index.row_of(torch.tensor(2.0)) is None
    assert index.reserve(torch.full((2,), 6.0), keep={2}) == 3  # 3 is kept, so 4 goes


def test_the_device_looks_rows_up_and_reports_an_unknown_timestep_at_the_next_call() -> None:
    index = index_of(1.0, 0.5)
    row, known = index.look_up(torch.full((2,), 0.5))
    assert (row.tolist(), bool(known)) == ([1], True)
    row, known = index.look_up(torch.full((2,), 0.25))
    assert (row.tolist(), bool(known)) == ([0], False)
    with pytest.raises(UnknownTimestep, match=r"timestep \[0.25, 0.25\], which has no row") as raised:
        index.look_up(torch.full((2,), 0.5))
    assert raised.value.values == [0.25, 0.25]
    assert bool(index.look_up(torch.full((2,), 0.5))[1])  # said once


def test_integers_are_their_own_bits() -> None:
    index = StepIndex(torch.zeros(2, dtype=torch.int64), 2, 2)
    assert index.reserve(torch.tensor([999, 999])) == 0
    assert index.look(torch.tensor([999, 999])).row == 0


def test_several_clocks_of_several_dtypes_are_one_key() -> None:
    index = StepIndex(torch.zeros(2), 2, 4, torch.zeros(2, dtype=torch.int64))
    half, one, two = torch.full((2,), 0.5), torch.ones(2, dtype=torch.int64), torch.full((2,), 2)
    assert index.reserve(half, one) == 0 and index.reserve(half, two) == 1 and index.reserve(2 * half, two) == 2
    assert index.look(half, two) == Look(1, True, [0.5, 2.0])
    assert index.look(torch.zeros(2), two).row is None
    assert index.look(half, torch.tensor([1, 2])) == Look(None, False, [0.5, 1.0])
    row, known = index.look_up(half, two)
    assert (row.tolist(), bool(known)) == ([1], True)
    assert not bool(index.look_up(2 * half, one)[1])  # each of them is known, and the pair is not
    with pytest.raises(UnknownTimestep, match=r"timestep \[1.0, 1.0\]"):
        index.look_up(half, one)
    assert index.row_of(torch.tensor(0.5), torch.tensor(1)) == 0
