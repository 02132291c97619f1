"""The one row of rank conditioning serves a range, and counts trajectories by their length."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._sampler.rank.range_rows import RangeRows
from fusion_compile._sampler.rank.timestep_range import TimestepRange
from fusion_compile._sampler.rows import Assigned, Seen, Unserved


def test_a_trajectory_is_counted_in_calls_of_the_request_it_began_with() -> None:
    rows = RangeRows(TimestepRange(0, 1), torch.zeros(1), 3)
    calls = [("a", True), ("b", True), *[("a", False), ("b", False)] * 4]
    assert [rows.starts_trajectory(0, slot, new=new) for slot, new in calls] == [
        True,
        True,
        *[False] * 5,
        True,
        False,
        False,
    ]


ROWS = TimestepRange(0.25, 0.75), torch.zeros(2), 3


def test_every_timestep_of_the_range_is_served_by_row_0_also_if_it_differs_within_a_call() -> None:
    rows = RangeRows(*ROWS)
    assert rows.locate(torch.tensor([0.25, 0.75]), None) == Seen(0)
    assert len(rows) == rows.capacity == 1
    assert rows.assign(torch.tensor([0.5, 0.3])) == Assigned([0, 0], {})


def test_a_timestep_outside_the_range_is_unserved_and_the_message_names_the_range() -> None:
    unserved = RangeRows(*ROWS).locate(torch.tensor([0.5, 0.8]), None)
    assert isinstance(unserved, Unserved)
    assert unserved.values == pytest.approx([0.5, 0.8])
    assert unserved.why == "is outside of [0.25, 0.75], which conditioning=Rank(…) was fitted to"


def test_the_range_is_as_wide_as_the_timesteps_dtype_rounds_it() -> None:
    rows = RangeRows(TimestepRange(0.001, 0.999), torch.zeros(2, dtype=torch.bfloat16), 3)
    assert rows.locate(torch.ones(2, dtype=torch.bfloat16), None) == Seen(0)  # 0.999 is 1 in bfloat16
