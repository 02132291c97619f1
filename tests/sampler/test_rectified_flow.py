"""Euler's method along a rectified flow, and the calls that it makes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.rectified_flow import euler, first_timestep, flow_calls, refuse_other_times

NOISE, T = torch.ones(2, 3), torch.ones(2)
ROLES = {"x": "live", "t": "step", "y": "request", "text": "request"}


def forward(x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> None: ...


def call_named(arguments: Mapping[str, Any], by_keyword: Collection[str]) -> Call:
    return take_apart(inspect.signature(forward), (), arguments)


def calls(*request: Any, unconditional: Any = None, **named: Any) -> list[dict[str, Any]]:
    name, made = flow_calls(inspect.signature(forward), ROLES, NOISE, T, request, named, unconditional, call_named)
    assert name == "x"
    return [call.arguments for call in made]


def test_the_steps_are_those_of_the_schedule_and_end_at_zero() -> None:
    seen: list[float] = []

    def velocities(i: int, x: Tensor) -> list[Tensor]:
        seen.append(float(x[0, 0]))
        return [torch.full_like(x, 2.0)]

    out = euler(NOISE, torch.tensor([1.0, 0.5]), 1.0, velocities)
    assert seen == [1.0, 0.0] and out.tolist() == [[-1.0] * 3] * 2  # 1 - 0.5 * 2, then 0 - 0.5 * 2


def test_guidance_mixes_the_velocity_with_the_unconditional_one() -> None:
    def velocities(i: int, x: Tensor) -> list[Any]:
        return [(torch.full_like(x, 3.0),), {"sample": torch.full_like(x, 1.0)}]  # a tuple and a dictionary

    assert euler(NOISE, torch.tensor([1.0]), 2.0, velocities).tolist() == [[1 - (1 + 2 * (3 - 1.0))] * 3] * 2


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model gives \[2, 4\] for noise of \[2, 3\]"):
        euler(NOISE, torch.tensor([1.0]), 1.0, lambda i, x: [torch.ones(2, 4)])


def test_requests_are_given_in_order_or_by_name() -> None:
    y, text = torch.tensor([1, 2]), torch.ones(2, 5)
    for (call,) in (calls(y, text), calls(y, text=text), calls(y=y, text=text)):
        assert call == {"x": NOISE, "t": T, "y": y, "text": text}


@pytest.mark.parametrize("form", ["a value", "a tuple", "a dictionary"])
def test_the_unconditional_request_replaces_what_it_names(form: str) -> None:
    y, text, other = torch.tensor([1, 2]), torch.ones(2, 5), torch.tensor([0, 0])
    unconditional = {"a value": other, "a tuple": (other,), "a dictionary": {"y": other}}[form]
    _, second = calls(y, text, unconditional=unconditional)
    assert second["y"] is other and second["text"] is text


def test_an_unconditional_request_of_another_shape_and_too_many_requests_are_refused() -> None:
    y, text = torch.tensor([1, 2]), torch.ones(2, 5)
    with pytest.raises(ValueError, match="unconditional must have the shapes and dtypes"):
        calls(y, text, unconditional=torch.zeros(2))
    with pytest.raises(ValueError, match=r"got 3 requests for the arguments \['y', 'text'\]"):
        calls(y, text, y)


def test_without_one_latent_and_one_timestep_it_cannot_sample() -> None:
    with pytest.raises(ValueError, match=r"needs one live argument and one timestep .* finds \['x', 'y'\] and \['t'\]"):
        flow_calls(inspect.signature(forward), {**ROLES, "y": "live"}, NOISE, T, (), {}, None, call_named)


def test_times_lie_between_zero_and_one() -> None:
    refuse_other_times(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"t in \[0, 1\] and the schedule begins \[999.0, 1.0\]"):
        refuse_other_times(torch.tensor([999.0, 1.0]))


def test_the_first_timestep_is_shaped_as_an_earlier_one_was() -> None:
    times = torch.tensor([0.5, 0.25])
    assert first_timestep(times, NOISE, None).tolist() == [0.5, 0.5]
    assert first_timestep(times, NOISE, torch.zeros(())).shape == ()
    like = torch.zeros(7, 3, dtype=torch.bfloat16)
    first = first_timestep(times, NOISE, like)
    assert first.shape == (2, 3) and first.dtype is torch.bfloat16
