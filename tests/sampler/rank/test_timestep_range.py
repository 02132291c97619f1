"""A range of timesteps: where it comes from, and the timesteps in it at which a fit is made."""

from __future__ import annotations

import torch

from fusion_compile._sampler.rank.timestep_range import TimestepRange


def test_samples_are_values_of_the_timesteps_dtype() -> None:
    integers, between = TimestepRange(0, 5).samples(512, torch.zeros(2, dtype=torch.int64))
    assert integers.tolist() == [0, 1, 2, 3, 4, 5] == between.tolist()  # nothing lies between
    some, others = TimestepRange(0, 999).samples(100, torch.zeros(1, dtype=torch.int64))
    assert len(some) == 100 and not set(some.tolist()) & set(others.tolist()) and some[-1] == 999
    halves, _ = TimestepRange(0.9, 1.1).samples(512, torch.zeros((), dtype=torch.bfloat16))
    assert halves.dtype is torch.bfloat16 and len(halves) == len(halves.unique()) < 50
