"""Schedules: their form, their length, and the dtype in which the model gets them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusion_compile._sampler.schedule import as_schedule, cast_schedule, count_steps, preset


def test_a_sequence_and_a_tensor_become_a_vector_on_the_cpu() -> None:
    assert as_schedule([3, 2, 1]).tolist() == [3, 2, 1]
    assert not as_schedule(torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("timesteps", [torch.ones(2, 2), torch.tensor(1.0), []], ids=["2-D", "0-D", "empty"])
def test_other_forms_are_refused_with_their_shape(timesteps: object) -> None:
    with pytest.raises(ValueError, match=r"timesteps has shape \[.*\]; a schedule is one value for each step, \[n\]"):
        as_schedule(timesteps)  # type: ignore[arg-type]


def test_steps_are_counted_from_either() -> None:
    assert count_steps(7, None) == 7
    assert count_steps(None, torch.ones(3)) == count_steps(3, torch.ones(3)) == 3


def test_neither_and_a_disagreement_are_refused() -> None:
    with pytest.raises(ValueError, match="neither n_steps nor timesteps is given"):
        count_steps(None, None)
    with pytest.raises(ValueError, match=r"timesteps has shape \[3\]; n_steps=4 needs \[4\]. Leave n_steps out"):
        count_steps(4, torch.ones(3))
    with pytest.raises(ValueError, match="n_steps=0; a schedule has at least one step"):
        count_steps(0, None)
    with pytest.raises(
        TypeError, match=r"n_steps=\[1.0, 0.5\]; pass a whole number of steps, and a schedule as timesteps="
    ):
        count_steps([1.0, 0.5], None)  # type: ignore[arg-type]


def test_the_preset_falls_from_one_and_leaves_out_zero() -> None:
    assert preset(4).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_integers_cannot_hold_fractions() -> None:
    assert cast_schedule(torch.tensor([3.0, 1.0]), torch.zeros(2, dtype=torch.int64)).tolist() == [3, 1]
    assert cast_schedule(torch.tensor([0.999]), torch.zeros(1, dtype=torch.bfloat16)).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"the timestep is torch.int64 and the schedule \[0.5\]… holds fractions"):
        cast_schedule(torch.tensor([0.5]), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("timesteps", ["abc", ["a"], {1.0: 2.0}, [None]])
def test_what_is_not_made_of_numbers_is_no_schedule(timesteps: Any) -> None:
    with pytest.raises(TypeError, match=r"^timesteps=.*; pass a tensor \[n\] or a list of numbers"):
        as_schedule(timesteps)


def test_a_schedule_is_finite() -> None:
    with pytest.raises(ValueError, match=r"timesteps=\[nan, 1\.0\] holds a value that is not finite"):
        as_schedule([math.nan, 1.0])
