"""Which timestep a call of a sampler is for: learned as it comes, prepared ahead, fixed, or not servable by a table."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.table.step_index import Look, StepIndex
from fusion_compile.sampler import Batched, optimize_sampler
from tests.small_denoiser import (
    NULL,
    TIMES,
    Counter,
    X,
    Y,
    denoiser,
    exactly,
    make,
    program_of,
    rows_of,
    trusted,
)

DTYPES = [torch.int64, torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (2,)], ids=["0-dim", "for each sample"])
def test_timesteps_of_any_dtype_are_learned_and_then_known(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make()
    times = [torch.full(shape, value).to(dtype) for value in (999.0, 500.0, 21.0, 1.0)]
    assert all(exactly(sampler, t) for t in times)
    counter = Counter(sampler, monkeypatch)
    assert all(exactly(sampler, t.clone()) for t in times)
    assert counter.taken() == {}
    assert len(rows_of(sampler).index) == 4


def test_a_step_is_computed_when_it_is_first_asked_for_and_once_for_each_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = make()
    sampler.prepare((X, torch.ones(2), Y))
    assert len(rows_of(sampler).index) == 0  # nobody asked for a timestep yet
    counter = Counter(sampler, monkeypatch)
    assert exactly(sampler, 1.0) and exactly(sampler, 1.0, NULL)  # serial guidance
    assert counter.taken() == {"STEP": 1, "REQUEST": 1, "STEP_REQUEST": 2}  # the request of Y is there
    assert exactly(sampler, 0.75) and exactly(sampler, 0.75, NULL)
    assert counter.taken() == {"STEP": 1, "STEP_REQUEST": 2}


SCHEDULES: dict[str, Sequence[float]] = {
    "Heun": (1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0),
    "RK4": (1.0, 0.875, 0.875, 0.75, 0.75, 0.625, 0.625, 0.5),
    "SDE": (1.0, 1.0, 0.75, 0.75, 0.5, 0.5),
    "time travel": (1.0, 0.75, 1.0, 0.75, 0.5, 0.75, 0.5),
    "ascending": (0.0, 0.25, 0.5, 0.75),
}


@pytest.mark.parametrize("times", SCHEDULES.values(), ids=SCHEDULES)
def test_solvers_may_repeat_and_come_back(times: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make()
    assert all(exactly(sampler, t) for t in times)
    counter = Counter(sampler, monkeypatch)
    assert all(exactly(sampler, t) for t in times) and all(exactly(sampler, t) for t in times[2:])  # img2img
    assert counter.taken() == {}


def test_room_doubles_to_four_schedules_and_then_the_row_not_used_for_longest_is_given_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = make(2)
    for n, room in [(1, 2), (2, 2), (3, 4), (5, 8), (8, 8)]:
        assert all(exactly(sampler, float(t)) for t in range(n))
        assert (len(rows_of(sampler).index), rows_of(sampler).index.capacity) == (n, room)
    assert exactly(sampler, 0.0) and exactly(sampler, 100.0)  # takes the place of 1
    counter = Counter(sampler, monkeypatch)
    assert all(exactly(sampler, float(t)) for t in (0, 2, 3, 4, 5, 6, 7, 100))
    assert counter.taken() == {}
    assert exactly(sampler, 1.0) and counter.taken()["STEP"] == 1
    assert len(rows_of(sampler).index) == rows_of(sampler).index.capacity == 8


def test_both_requests_follow_a_table_that_grew_and_gave_rows_away() -> None:
    sampler = make(1)
    for t in [*range(6), *range(6)]:
        assert exactly(sampler, float(t)) and exactly(sampler, float(t), NULL)


def test_bf16_timesteps_that_round_to_one_value_have_one_row() -> None:
    times = torch.tensor([1.0, 0.9990, 0.9985, 0.5])
    sampler = make(4, timesteps=times)
    for t in times:
        assert exactly(sampler, t.to(torch.bfloat16).expand(2))
    assert len(rows_of(sampler).index) == len(times.bfloat16().unique()) < 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_prepare_sets_a_schedule_before_anything_is_known(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make()
    schedule = torch.tensor([981, 741, 500, 261, 21])
    sampler.prepare(timesteps=schedule)
    sampler.prepare(kwargs={"y": Y}, timesteps=schedule.tolist())  # the latent's shape is still not known
    assert sampler.timesteps.tolist() == schedule.tolist() and len(sampler._programs) == 0
    assert exactly(sampler, schedule[:1].to(dtype).expand(2))
    counter = Counter(sampler, monkeypatch)
    assert all(exactly(sampler, t.to(dtype).expand(2)) for t in schedule)
    assert counter.taken() == {}  # all five rows came with the first call
    assert exactly(sampler, torch.full((2,), 7).to(dtype)) and counter.taken()["STEP"] == 1


def test_prepare_with_a_schedule_and_a_request_leaves_nothing_for_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make()
    assert exactly(sampler, 1.0)
    schedule = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    sampler.prepare(kwargs={"y": NULL}, timesteps=schedule)
    counter = Counter(sampler, monkeypatch)
    assert all(exactly(sampler, t.expand(2), NULL) for t in schedule)
    assert counter.taken() == {}
    sampler.prepare(timesteps=[0.3, 0.2])
    assert counter.taken() == {"STEP": 2, "STEP_REQUEST": 4}  # for both requests that are kept
    assert all(exactly(sampler, t, y) for t in (0.3, 0.2) for y in (Y, NULL)) and counter.taken() == {}
    sampler.prepare((X, torch.full((2,), 0.3), Y + 1))
    assert counter.taken() == {"REQUEST": 1, "STEP_REQUEST": 2}
    assert exactly(sampler, 0.2, Y + 1) and counter.taken() == {}


def test_a_fixed_schedule_may_be_changed_by_prepare_and_others_go_to_the_model() -> None:
    sampler = make(2, timesteps=[1.0, 0.5])
    assert exactly(sampler, 1.0) and exactly(sampler, 0.5)
    sampler.prepare(timesteps=[0.9, 0.6, 0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(exactly(sampler, t) for t in (0.9, 0.6, 0.3))
    with pytest.warns(UserWarning, match=r"timestep \[0.25, 0.25\] is not in the sampler's schedule of 3 steps"):
        assert exactly(sampler, 0.25)


def test_a_schedule_may_be_the_models_own_argument() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = denoiser()

        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.inner(x, timesteps, y)
            return out

    sampler = optimize_sampler(Named().eval(), 2, mode="eager")
    sampler.prepare((X,), {"timesteps": torch.ones(2), "y": Y}, timesteps=[0.5, 0.2])
    assert sampler.timesteps.tolist() == pytest.approx([0.5, 0.2])
    assert exactly(sampler, 0.5) and torch.equal(
        sampler(X, timesteps=torch.full((2,), 0.2), y=Y), sampler.model(X, torch.full((2,), 0.2), Y)
    )


def test_a_timestep_for_each_token_has_a_row_if_all_are_equal_and_else_is_the_models() -> None:
    sampler, x = make(), torch.randn(2, 3, 4)
    for t in (0.9, 0.5):
        assert exactly(sampler, torch.full((2, 3), t), x=x)
    uneven = torch.tensor([[0.9, 0.9, 0.5], [0.9, 0.9, 0.9]])
    with pytest.warns(UserWarning, match="differs within one call"):
        assert exactly(sampler, uneven, x=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exactly(sampler, uneven + 1, x=x)  # said once
        assert exactly(sampler, torch.full((2, 3), 0.9), x=x)
    sampler.release_weights(to="drop")
    with pytest.raises(RuntimeError, match=r"timestep \[0.899.*differs within one call"):
        sampler(x, uneven, Y)


def test_batched_rows_are_computed_together_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make(conditioning=Batched())
    schedule = torch.tensor([0.9, 0.6, 0.3])
    sampler.prepare(timesteps=schedule)
    for t in schedule:
        t = t.expand(2).clone()
        torch.testing.assert_close(sampler(X, t, Y), sampler.model(X, t, Y).detach(), atol=1e-5, rtol=1e-5)
    counter = Counter(sampler, monkeypatch)
    assert exactly(sampler, 0.1) and counter.taken()["STEP"] == 1  # one learned row is exact
    measured = program_of(sampler).table.measured_difference
    assert measured is not None and measured < 1e-5  # fp32, another order of summation


def test_dropped_weights_leave_what_was_prepared_and_an_unknown_timestep_is_named() -> None:
    model = denoiser()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler = optimize_sampler(model, 4, mode="eager")
    sampler.prepare((X, torch.tensor([7, 7]), Y))
    with pytest.raises(ValueError, match="no timestep is known yet"):
        sampler.release_weights(to="drop")
    sampler.prepare(timesteps=[981, 500, 21])
    assert sampler.release_weights(to="drop") > 0
    twin = denoiser()
    twin.load_state_dict(state)
    with torch.no_grad():
        for value in (981, 500, 21):
            t = torch.tensor([value, value])
            assert torch.equal(sampler(X, t, Y), twin(X, t, Y))
        with pytest.raises(RuntimeError, match=r"timestep \[999, 999\] is not in the sampler's schedule of 3 rows"):
            sampler(X, torch.tensor([999, 999]), Y)
        with pytest.raises(RuntimeError, match=r"timestep \[999.0\] is not in the sampler's schedule of 3 rows"):
            sampler.prepare(timesteps=[999, 500])
    sampler.restore_weights(state)
    assert exactly(sampler, torch.tensor([999, 999])) and exactly(sampler, torch.tensor([500, 500]))


def test_dropping_completes_the_preset_of_sample_if_no_other_timestep_was_asked_for() -> None:
    sampler = make(4)
    twin = denoiser()
    twin.load_state_dict(sampler.model.state_dict())
    sampler.prepare((X, torch.ones(2), Y))
    sampler.release_weights(to="drop")
    with torch.no_grad():
        assert all(torch.equal(sampler(X, t.expand(2), Y), twin(X, t.expand(2), Y)) for t in sampler.timesteps)
    other = make(4)
    assert exactly(other, 0.3)
    other.release_weights(to="drop")
    assert len(rows_of(other).index) == 1


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [(torch.ones(2, 2), r"has shape \[2, 2\]; a schedule is one value for each step"), ([], "has shape")],
    ids=["2-D", "empty"],
)
def test_a_schedule_of_another_form_is_refused(timesteps: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make().prepare(timesteps=timesteps)  # type: ignore[arg-type]


def test_prepare_refuses_what_the_model_does_not_take_and_a_request_in_parts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = denoiser()

        def forward(self, x: Tensor, timestep: Tensor, y: Tensor, text: Tensor) -> Tensor:
            out: Tensor = self.inner(x + text, timestep, y)
            return out

    sampler = optimize_sampler(Two().eval(), 2, mode="eager")
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        sampler.prepare(kwargs={"label": Y})
    sampler(X, torch.ones(2), Y, X)
    with pytest.raises(TypeError, match=r"prepare\(\) lacks \['text'\] of the request"):
        sampler.prepare(kwargs={"y": Y})


# ---- where looking at the timestep costs a wait


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    looks: list[float] = []
    look = StepIndex.look

    def counted(index: StepIndex, t: Tensor) -> Look:
        seen = look(index, t)
        looks.append(seen.values[0])
        return seen

    monkeypatch.setattr(StepIndex, "look", counted)
    return looks


def test_a_trusted_caller_is_looked_at_where_a_trajectory_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = trusted()
    looks = count_looks(monkeypatch)
    for t in [*TIMES, *TIMES]:
        assert exactly(sampler, t)
    assert looks == [8, 7, 8, 7]
    never = trusted(verify="never")
    looks.clear()
    for t in [*TIMES, *TIMES]:
        assert exactly(never, t)
    assert looks == []
    always = trusted(verify="always")
    looks.clear()
    for t in TIMES:
        assert exactly(always, t)
    assert looks == list(TIMES)


def test_a_new_schedule_of_a_trusted_caller_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = trusted()
    for t in (8.0, 7.5, 7.0, 6.5, 6.0, 5.5):  # the first is the same
        assert exactly(sampler, t)
    for t in (0.3, 0.2):
        assert exactly(sampler, t)


def test_guidance_in_two_calls_and_new_requests_of_a_trusted_caller_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = trusted()
    for t, y in itertools.product(TIMES * 4, (Y, NULL)):
        assert exactly(sampler, t, y)
    for label in (3, 4):
        y = torch.full((2,), label)
        assert all(exactly(sampler, t, y) for t in TIMES)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "learned"])
def test_an_unknown_timestep_of_a_trusted_caller_gives_nan_and_then_an_error_with_its_value(fixed: bool) -> None:
    options = {"timesteps": TIMES} if fixed else {}
    sampler = trusted(verify="never", **options)
    t = torch.tensor([0.25, 0.25])
    assert sampler(X, t, Y).isnan().all()
    with pytest.raises(RuntimeError, match=r"asked for timestep \[0.25, 0.25\].*its output is NaN"):
        sampler(X, torch.full((2,), 8.0), Y)
    if fixed:
        with pytest.warns(UserWarning, match="not in the sampler's schedule"):
            assert exactly(sampler, 0.25)
    else:
        assert exactly(sampler, 0.25)
    assert exactly(sampler, 8.0)


def test_a_request_that_changes_at_every_step_is_served_and_said_once() -> None:
    """Dynamic guidance, prompt travel: right, and worth a word."""
    sampler = make()
    labels = [torch.tensor([1 + i % 2, i % 5]) for i in range(8)]
    with pytest.warns(UserWarning, match=r"^y changed in the middle of a schedule.*roles=\{'y': 'live'\}") as said:
        assert all(exactly(sampler, t, y) for t, y in zip((*TIMES, *TIMES), labels, strict=True))
    assert len(said) == 1 and said[0].filename.endswith("small_denoiser.py")  # the caller's line, not the sampler's


def test_a_new_request_for_each_image_and_guidance_in_two_calls_are_no_changes() -> None:
    sampler = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in range(6):
            y = torch.tensor([image % 5, 1])
            assert all(exactly(sampler, t, y) and exactly(sampler, t, NULL) for t in TIMES)
