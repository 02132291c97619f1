"""One program: it follows a schedule and its weights, and refuses what needs dropped weights."""

from __future__ import annotations

import inspect

import pytest
import torch

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.program import SamplerProgram
from fusion_compile._sampler.rows import Learnable, Seen
from tests.small_denoiser import NULL, X, Y, make, program_of


def called(t: float = 1.0, y: torch.Tensor = Y) -> tuple[SamplerProgram, Call]:
    sampler = make()
    call = take_apart(sampler._signature, (X, torch.full((2,), t), y), {})
    sampler(*call.tensors)
    return program_of(sampler), call


def test_weights_are_named_by_the_part_that_reads_them() -> None:
    program, _ = called()
    assert program.body_names == {"out.weight", "out.bias"}
    assert program.early_names == {
        f"{layer}.{kind}" for layer in ("time", "modulation") for kind in ("weight", "bias")
    } | {"label.weight"}
    assert program.unread_names == frozenset() and program.not_captured is None


def test_a_schedule_is_followed_once_and_its_rows_are_ahead() -> None:
    program, _ = called()
    assert list(program.rows_ahead()) == [] and list(program.scheduled_rows()) == [0]
    schedule = torch.tensor([0.5, 1.0])
    program.follow_schedule(schedule)
    assert list(program.rows_ahead()) == list(program.scheduled_rows()) == [1, 0]
    program.follow_schedule(schedule)
    assert list(program.rows_ahead()) == [1, 0] and len(program.rows_in_use()) == 2
    program.follow_schedule(None)
    assert list(program.rows_ahead()) == [] and len(program.rows_in_use()) == 2


def test_a_timestep_without_a_row_is_learned() -> None:
    program, call = called()
    slot = program.find_request(call)
    assert program.locate(call, slot) == Seen(0)
    other = take_apart(torch_signature(), (X, torch.full((2,), 0.25), Y), {})
    located = program.locate(other, slot)
    assert isinstance(located, Learnable) and program.learn_timestep(other, slot, located) == 1
    assert program.locate(other, slot) == Seen(1)


def torch_signature() -> inspect.Signature:
    return make()._signature


def test_a_request_is_completed_from_the_last_call_and_needs_all_its_parts() -> None:
    program, _ = called()
    arguments = program.complete_arguments({"y": NULL})
    assert arguments["y"] is NULL and arguments["x"].tolist() == torch.zeros(2, 4).tolist()
    with pytest.raises(TypeError, match=r"prepare\(\) lacks \['y'\] of the request"):
        program.complete_arguments({"x": X})


def test_the_arguments_that_changed_between_two_requests_are_named() -> None:
    program, call = called()
    assert program.changed_arguments(call) == ()
    other = take_apart(torch_signature(), (X, torch.ones(2), NULL), {})
    program.open_request(other)
    assert program.changed_arguments(other) == ("y",)


def test_nothing_is_computed_again_for_weights_that_no_stage_reads() -> None:
    program, call = called()
    slot = program.find_request(call)
    program.invalidate({"out.weight"})
    assert program.table.stages_missing(slot, [0]) == frozenset()
    program.invalidate({"modulation.bias"})
    assert {time.name for time in program.table.stages_missing(slot, [0])} == {"STEP_REQUEST"}
    program.invalidate(None)
    assert {time.name for time in program.table.stages_missing(slot, [0])} >= {"STEP", "REQUEST", "STEP_REQUEST"}


def test_a_row_is_an_index_on_the_device_and_kept() -> None:
    program, _ = called()
    assert program.row_index(2).tolist() == [2] and program.row_index(2) is program.row_index(2)


def test_the_report_counts_released_bytes() -> None:
    program, _ = called()
    assert program.report(123).released == 123 and program.report(0).rows == "exact"
