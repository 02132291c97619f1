"""The options of a sampler are checked together, before anything is built."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fusion_compile._sampler.conditioning import Batched, Exact, Rank
from fusion_compile._sampler.options import SamplerOptions
from fusion_compile._sampler.rank.timestep_range import TimestepRange


def test_the_defaults_are_exact_rows_without_a_schedule() -> None:
    options = SamplerOptions(4)
    assert options.conditioning == Exact() and options.schedule is None
    assert options.verify == "trajectory" and options.fitted_range is None


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"n_steps": 0}, ValueError, "at least one step"),
        ({"schedule": torch.ones(3)}, ValueError, r"n_steps=4 needs \[4\]"),
        ({"verify": "pass"}, ValueError, "verify='pass'; use 'trajectory', 'always' or 'never'"),
        ({"mode": "fast"}, ValueError, "mode='fast' is not known"),
        ({"conditioning": "exact"}, TypeError, r"conditioning='exact'; pass Exact\(\)"),
        ({"conditioning": Rank(8)}, ValueError, "fitted to a range of timesteps and none is known"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_served_is_refused(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        SamplerOptions(**{"n_steps": 4, **options})


def test_a_rank_is_fitted_to_its_range_or_to_the_schedule() -> None:
    schedule = torch.tensor([0.75, 0.25])
    assert SamplerOptions(2, schedule, Rank(8, (0, 1))).fitted_range == TimestepRange(0, 1)
    assert SamplerOptions(2, schedule, Rank(8)).fitted_range == TimestepRange(0.25, 0.75)
    assert SamplerOptions(2, schedule, Batched()).fitted_range is None


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("backend", 3, TypeError),
        ("backend", None, TypeError),
        ("roles", "step", TypeError),
        ("roles", ["t"], TypeError),
        ("byte_budget", "1GB", ValueError),
        ("byte_budget", -1, ValueError),
        ("byte_budget", math.nan, ValueError),
        ("byte_budget", True, ValueError),
    ],
)
def test_an_option_of_another_kind_is_refused(option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{option}={re.escape(repr(value))}"):
        SamplerOptions(4, **{option: value})
