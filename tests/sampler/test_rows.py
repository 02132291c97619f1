"""What every kind of rows promises, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion_compile._sampler.rank.range_rows import RangeRows
from fusion_compile._sampler.rank.timestep_range import TimestepRange
from fusion_compile._sampler.rows import Rows, Seen
from fusion_compile._sampler.table.learned_rows import LearnedRows

T = torch.zeros(2)
KINDS: dict[str, Callable[[], Rows]] = {
    "learned": lambda: LearnedRows(T, 3, fixed=False, verify="trajectory"),
    "range": lambda: RangeRows(TimestepRange(0, 1), T, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_assigned_timesteps_are_served_by_the_rows_they_got(kind: str) -> None:
    rows, values = KINDS[kind](), torch.tensor([1.0, 0.5, 0.5])
    assigned = rows.assign(values)
    assert rows.without_row(values) == [] and rows.has_only(values)
    assert assigned.rows[1] == assigned.rows[2] < len(rows) <= rows.capacity
    assert set(assigned.fresh) <= set(assigned.rows)
    for value, row in zip(values, assigned.rows, strict=True):
        assert rows.locate(value.expand(2), None) == Seen(row)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trajectory_starts_with_a_new_request_and_again_after_its_steps(kind: str) -> None:
    rows = KINDS[kind]()
    order = rows.assign(torch.tensor([1.0, 0.5, 0.25])).rows
    calls = [(row, first and i == 0) for first in (True, False) for i, row in enumerate(order)]
    assert [rows.starts_trajectory(row, "request", new=new) for row, new in calls] == [True, False, False] * 2
