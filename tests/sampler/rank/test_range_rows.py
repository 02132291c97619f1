"""The one row of rank conditioning serves a range, and counts trajectories by their length."""

from __future__ import annotations

import torch

from fusion_compile._sampler.rank.range_rows import RangeRows
from fusion_compile._sampler.rank.timestep_range import TimestepRange


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
