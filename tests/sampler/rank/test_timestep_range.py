"""A range of timesteps: where it comes from, and the timesteps in it at which a fit is made."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._sampler.conditioning import Rank
from fusion_compile._sampler.rank.timestep_range import TimestepRange, range_to_fit


def test_samples_are_values_of_the_timesteps_dtype() -> None:
    integers, between = TimestepRange(0, 5).samples(512, torch.zeros(2, dtype=torch.int64))
    assert integers.tolist() == [0, 1, 2, 3, 4, 5] == between.tolist()  # nothing lies between
    some, others = TimestepRange(0, 999).samples(100, torch.zeros(1, dtype=torch.int64))
    assert len(some) == 100 and not set(some.tolist()) & set(others.tolist()) and some[-1] == 999
    halves, _ = TimestepRange(0.9, 1.1).samples(512, torch.zeros((), dtype=torch.bfloat16))
    assert halves.dtype is torch.bfloat16 and len(halves) == len(halves.unique()) < 50


def test_the_range_is_the_one_asked_for_in_any_order_or_that_of_the_schedule() -> None:
    assert range_to_fit(Rank(8, (1, 0)), None) == TimestepRange(0, 1)
    assert range_to_fit(Rank(8, (0, 1)), torch.tensor([5, 3])) == TimestepRange(0, 1)
    assert range_to_fit(Rank(8), torch.tensor([5, 3])) == TimestepRange(3, 5)


def test_no_range_and_a_schedule_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Rank\(8\) is fitted to a range .* pass Rank\(8, \(0, 1\)\)"):
        range_to_fit(Rank(8), None)
    with pytest.raises(ValueError, match=r"the range of timesteps is \[3, 3\]; pass Rank\(8, \(first, last\)\)"):
        range_to_fit(Rank(8), torch.tensor([3, 3]))


def test_a_cast_widens_the_range_to_what_it_rounds_to() -> None:
    assert TimestepRange(0.001, 0.999).in_dtype_of(torch.zeros(1, dtype=torch.bfloat16)).high == 1.0
    assert TimestepRange(0.25, 0.5).in_dtype_of(torch.zeros(1)) == TimestepRange(0.25, 0.5)
