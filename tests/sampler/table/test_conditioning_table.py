"""A table: what is missing, what is computed, and what changed weights make stale."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch

from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import trace_denoiser
from fusion_compile._sampler.graph.roles import assign_roles
from fusion_compile._sampler.split import split_denoiser
from fusion_compile._sampler.table.conditioning_table import ConditioningTable, bind_weights
from fusion_compile.passes import BindingTime
from tests.small_denoiser import X, Y, denoiser


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As a sampler fills its table."""
    with torch.no_grad():
        yield


STEP, REQUEST, STEP_REQUEST = BindingTime.STEP, BindingTime.REQUEST, BindingTime.STEP_REQUEST


def table(*, batched: bool = False) -> ConditioningTable:
    model = denoiser()
    signature = inspect.signature(model.forward)
    call = take_apart(signature, (X, torch.ones(2), Y), {})
    roles = assign_roles(call.arguments, None)
    split = split_denoiser(trace_denoiser(model, call), call, roles, n_steps=3)
    return ConditioningTable(split, batched=batched, n_slots=2, mode="eager", backend="inductor")


def test_only_what_is_missing_is_named_and_computing_it_leaves_nothing() -> None:
    made = table()
    for row, value in enumerate((1.0, 0.5)):
        made.assign_row(row, torch.full((2,), value), 3)
    slot = made.take_slot({"y": Y})
    assert made.stages_missing(slot, [0, 1]) == {STEP, REQUEST, STEP_REQUEST}
    made.compute(slot, [0])
    assert made.stages_missing(slot, [0]) == set()
    assert made.stages_missing(slot, [0, 1]) == {STEP, STEP_REQUEST}
    made.compute(slot, [0, 1])
    assert made.find_request({"y": Y.clone()}) is slot and made.live_slots() == (slot,)


def test_a_stale_stage_makes_what_reads_it_stale() -> None:
    made = table()
    made.assign_row(0, torch.ones(2), 3)
    slot = made.take_slot({"y": Y})
    made.compute(slot, [0])
    made.mark_stale([REQUEST])
    assert made.stages_missing(slot, [0]) == {REQUEST, STEP_REQUEST}
    made.compute(slot, [0])
    made.mark_stale([STEP])
    assert made.stages_missing(slot, [0]) == {STEP, STEP_REQUEST}


def test_a_selected_row_is_what_the_body_reads() -> None:
    made = table()
    slot = made.take_slot({"y": Y})
    for row, value in enumerate((1.0, 0.5)):
        made.assign_row(row, torch.full((2,), value), 3)
    made.compute(slot, [0, 1])
    seen = []
    for row in (0, 1, 0):
        made.select(slot, torch.tensor([row]))
        seen.append(torch.cat([t.flatten() for t in made.residuals().values()]).clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_rows_in_a_batch_are_measured_against_rows_alone() -> None:
    exact, batched = table(), table(batched=True)
    assert exact.measured_difference is None and batched.measured_difference == 0
    slot = batched.take_slot({"y": Y})
    for row, value in enumerate((1.0, 0.5)):
        batched.assign_row(row, torch.full((2,), value), 3)
    batched.compute(slot, [0, 1])
    assert 0 <= batched.measured_difference < 1e-5  # fp32, another order of summation


def test_bound_weights_are_attributes_and_the_rest_stay_inputs() -> None:
    model = denoiser()
    signature = inspect.signature(model.forward)
    call = take_apart(signature, (X, torch.ones(2), Y), {})
    traced = trace_denoiser(model, call)
    assert bind_weights(traced.graph_module, traced.weights) == traced.inputs == ("x", "timestep", "y")
    with torch.no_grad():
        (got,) = traced.graph_module(*call.tensors)
        assert torch.equal(got, model(*call.tensors))
        model.out.weight.mul_(2)
        (got,) = traced.graph_module(*call.tensors)
        assert torch.equal(got, model(*call.tensors))
