"""The module in the model's place: what its public verbs refuse, and that a refusal changes nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.small_denoiser import X, Y, denoiser, exactly, make


def test_the_report_is_empty_before_the_first_call_and_has_a_program_after_it() -> None:
    sampler = make()
    assert str(sampler.report) == "sampler of Denoiser, 4 steps: not called yet, nothing is known"
    assert exactly(sampler, 1.0)
    assert [program.inputs[0] for program in sampler.report.programs] == ["x float32[2, 4] cpu"]


def test_prepare_takes_arguments_as_export_does_and_refuses_others() -> None:
    sampler = make()
    with pytest.raises(TypeError, match=r"prepare: args is a Tensor; pass a tuple of the call's positional arguments"):
        sampler.prepare(X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional arguments but 4 were given"):
        sampler.prepare(X, torch.ones(2), Y)  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        sampler.prepare(y=Y)  # type: ignore[call-arg]
    sampler.prepare((X,), {"timestep": torch.ones(2), "y": Y})
    assert len(sampler.report.programs) == 1


def test_a_refused_schedule_leaves_the_old_one() -> None:
    sampler = make(timesteps=[3, 2, 1, 0])
    assert exactly(sampler, torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="holds fractions"):
        sampler.prepare(timesteps=[0.5, 0.25])
    assert sampler.timesteps.tolist() == [3, 2, 1, 0] and exactly(sampler, torch.tensor([2, 2]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        sampler.prepare(kwargs={"label": Y}, timesteps=[7, 6])
    assert sampler.timesteps.tolist() == [3, 2, 1, 0]


def test_a_schedule_that_could_not_be_prepared_is_not_followed() -> None:
    sampler = make()
    assert exactly(sampler, 1.0)
    sampler.release_weights(to="drop")
    with pytest.raises(RuntimeError, match="a new request needs weights"):
        sampler.prepare(kwargs={"y": Y + 1}, timesteps=[1.0])  # the timestep has a row, the request has none
    assert len(sampler.timesteps) == 4
    sampler(X, torch.ones(2), Y)
    assert list(sampler._programs.values()[0].scheduled_rows()) == [0, 1, 2, 3]  # the preset, no schedule


def test_a_release_needs_a_destination_and_something_hoisted() -> None:
    sampler = make()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'to'"):
        sampler.release_weights()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="nothing was hoisted yet"):
        sampler.release_weights(to="drop")
    assert exactly(sampler, 1.0)
    assert sampler.release_weights(to=torch.device("cpu")) == 0


def test_guidance_needs_an_unconditional_request_and_the_old_name_is_an_unknown_argument() -> None:
    sampler = make()
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs unconditional="):
        sampler.sample(X, Y, guidance_scale=2.0)
    with pytest.raises(TypeError, match="'null'"):
        sampler.sample(X, Y, guidance_scale=2.0, unconditional=Y, null=Y)


def test_a_loaded_state_dict_finds_no_sampler_that_is_gone() -> None:
    model = denoiser()
    from fusion_compile.sampler import optimize_sampler

    sampler = optimize_sampler(model, 2, mode="eager")
    programs = weakref.ref(sampler._programs)
    del sampler
    gc.collect()
    assert programs() is None
    model.load_state_dict(model.state_dict())
