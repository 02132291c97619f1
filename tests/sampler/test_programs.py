"""The programs of one model: one for each key, the least recently used dropped, all following one schedule."""

from __future__ import annotations

import inspect

import pytest
import torch

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.options import SamplerOptions
from fusion_compile._sampler.programs import SamplerPrograms
from fusion_compile._sampler.weights.release import ReleasableWeights
from fusion_compile._say_once import SayOnce
from tests.small_denoiser import Denoiser, denoiser


def programs(model: Denoiser | None = None, **options: object) -> SamplerPrograms:
    model = model or denoiser()
    made = SamplerOptions(2, mode="eager", **options)  # type: ignore[arg-type]
    return SamplerPrograms(model, inspect.signature(model.forward), made, ReleasableWeights(model), SayOnce())


def call_of(batch: int) -> Call:
    signature = inspect.signature(denoiser().forward)
    args = (torch.randn(batch, 4), torch.ones(batch), torch.zeros(batch).long())
    return take_apart(signature, args, {}, keywords_matter=False)


def test_equal_keys_share_a_program_and_the_last_used_stands_at_the_end() -> None:
    kept = programs()
    two, three = kept.of(call_of(2)), kept.of(call_of(3))
    assert kept.of(call_of(2)) is two and kept.values() == (three, two) and len(kept) == 2


def test_a_schedule_reaches_every_program_and_a_failed_change_leaves_it() -> None:
    kept = programs()
    program = kept.of(call_of(2))
    schedule = torch.tensor([0.5, 0.25, 0.125])
    with kept.changing_schedule(schedule):
        kept.of(call_of(2))
    assert kept.schedule is schedule and list(program.scheduled_rows()) == [0, 1, 2]
    with pytest.raises(KeyError), kept.changing_schedule(torch.ones(1)):
        raise KeyError
    assert kept.schedule is schedule
    with kept.changing_schedule(None):
        assert kept.schedule is schedule


def test_a_program_built_under_a_schedule_reckons_with_its_length() -> None:
    kept = programs()
    kept.schedule = torch.tensor([0.5, 0.25, 0.125])
    assert kept.of(call_of(2)).split.n_steps == 3


def test_roles_come_from_names_before_the_first_call_and_unknown_arguments_are_refused() -> None:
    assert programs().roles == {"x": "live", "timestep": "step", "y": "request"}
    with pytest.raises(ValueError, match=r"roles name \['time'\], which Denoiser.forward does not take"):
        programs(roles={"time": "step"})


def test_a_call_is_completed_from_the_last_one_if_it_names_a_request_alone() -> None:
    kept = programs()
    assert kept.complete_call((), {}) is None and kept.complete_call((), {"y": torch.tensor([1, 2])}) is None
    kept.of(call_of(2))
    completed = kept.complete_call((), {"y": torch.tensor([1, 2])})
    assert completed is not None and completed.key == call_of(2).key


def test_another_structure_drops_all_programs_with_a_warning() -> None:
    model = denoiser()
    kept = programs(model)
    first = kept.of(call_of(2))
    model.out = torch.nn.Linear(4, 4).eval()
    with pytest.warns(UserWarning, match="^out was a Linear .* is another Linear now; the sampler is built again"):
        assert kept.of(call_of(2)) is not first


def test_a_model_in_training_mode_is_refused() -> None:
    model = denoiser()
    model.train()
    with pytest.raises(ValueError, match="Denoiser is in training mode; call model"):
        programs(model).of(call_of(2))
