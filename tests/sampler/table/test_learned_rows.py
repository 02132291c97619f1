"""Learned rows: four answers to a timestep, and a schedule that keeps its own rows."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._sampler.rows import Found, Learnable, Seen, Unserved
from fusion_compile._sampler.table.learned_rows import LearnedRows
from fusion_compile._sampler.table.step_index import UnknownTimestep


def rows_like(n_steps: int = 2, *, fixed: bool = False) -> LearnedRows:
    return LearnedRows(torch.zeros(2), n_steps, fixed=fixed, verify="never")


def at(value: float) -> torch.Tensor:
    return torch.full((2,), value)


def test_a_new_timestep_is_learnable_and_then_seen() -> None:
    rows = rows_like()
    located = rows.locate(at(0.5), None)
    assert isinstance(located, Learnable) and located.values == [0.5, 0.5]
    assert len(rows) == 0  # asking gives nothing away
    assert located.learn() == 0
    assert rows.locate(at(0.5), None) == Seen(0)


def test_a_timestep_outside_a_fixed_schedule_is_unserved_and_so_is_one_that_differs_within_a_call() -> None:
    rows = rows_like(fixed=True)
    rows.assign(torch.tensor([1.0, 0.5, 0.25]))
    unknown = rows.locate(at(0.3), None)
    assert isinstance(unknown, Unserved) and unknown.why == "is not in the sampler's schedule of 3 steps"
    uneven = rows_like().locate(torch.tensor([1.0, 0.5]), None)
    assert isinstance(uneven, Unserved) and uneven.topic == "uneven t"


def test_a_schedule_longer_than_the_table_makes_room_and_keeps_its_own_rows() -> None:
    rows = rows_like(1)
    first = rows.assign(torch.tensor([1.0, 0.5, 0.25]))
    assert (first.rows, rows.capacity) == ([0, 1, 2], 3)
    assert {row: t.tolist() for row, t in first.fresh.items()} == {0: [1, 1], 1: [0.5, 0.5], 2: [0.25, 0.25]}
    again = rows.assign(torch.tensor([0.5, 0.125]))
    assert again.rows == [1, 3] and set(again.fresh) == {3}
    assert rows.without_row(torch.tensor([0.125, 9.0])) == [9.0]
    assert not rows.has_only(torch.tensor([0.5, 0.125]))


def test_a_trusted_callers_row_is_found_on_the_device_and_an_unknown_one_ends_the_trust() -> None:
    rows = rows_like()
    rows.trajectories._look_always = False  # the rule of a GPU, on a CPU
    order = rows.assign(torch.tensor([1.0, 0.5])).rows
    for row in order * 2:
        assert rows.locate(at([1.0, 0.5][row]), "request") == Seen(row)
        rows.starts_trajectory(row, "request", new=False)
    found = rows.locate(at(0.5), "request")
    assert isinstance(found, Found) and found.row.tolist() == [1] and bool(found.known)
    unknown = rows.locate(at(0.3), "request")
    assert isinstance(unknown, Found) and not bool(unknown.known)
    with pytest.raises(UnknownTimestep):
        rows.locate(at(0.5), "request")
    assert rows.locate(at(0.5), "request") == Seen(1)
