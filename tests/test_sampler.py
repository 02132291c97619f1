"""optimize_sampler: what it serves is what the model computes, whatever the order of calls."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any, TypeVar

import pytest
import torch
from dit import DiT
from torch import Tensor, nn

from fusion_compile.sampler import Batched, Sampler, optimize_sampler
from tests.small_denoiser import Scalar

N_STEPS = 8
ModelT = TypeVar("ModelT", bound=nn.Module)


def random_dit(**config: Any) -> DiT:
    """Weights that are random and not zero: adaLN-zero's zeros would hide every error of the conditioning."""
    return randomized(DiT(**{"hidden_size": 32, "depth": 1, "num_heads": 2, **config}))


def randomized(model: ModelT) -> ModelT:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def difference(sampler: Sampler, *args: Any, **kwargs: Any) -> float:
    with torch.no_grad():
        return float((sampler(*args, **kwargs) - sampler.model(*args, **kwargs)).abs().max())


@pytest.mark.parametrize("batch", [1, 3])
def test_exact_mode_is_bitwise_the_model_conditioned_on_labels(batch: int) -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    for y in (torch.randint(0, 10, (batch,)), torch.randint(0, 10, (batch,))):
        for t in sampler.timesteps:
            assert difference(sampler, torch.randn(batch, 1, 8, 8), t.expand(batch), y) == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_exact_mode_is_bitwise_the_model_conditioned_on_time_alone(batch: int) -> None:
    sampler = optimize_sampler(random_dit(num_classes=None), N_STEPS, mode="eager")
    for t in sampler.timesteps:
        assert difference(sampler, torch.randn(batch, 1, 8, 8), t.expand(batch)) == 0


class _Oddly(nn.Module):
    """Nothing here has a name that any list of names knows; integer time, a dict of conditions, a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Embedding(1000, 12), nn.Linear(6, 12)
        self.gamma, self.delta = nn.Linear(12, 24), nn.Conv1d(4, 4, 3, padding=1)
        self.register_buffer("epsilon", torch.randn(12))

    def forward(self, foo: Tensor, *, bar: Tensor, qux: dict[str, Tensor], flag: bool = True) -> tuple[Tensor, Tensor]:
        c = self.alpha(bar).type_as(foo) + self.beta(qux["one"]) + torch.zeros_like(foo[:, 0]) + self.epsilon
        shift, scale = self.gamma(c).sigmoid().chunk(2, dim=-1)
        foo = self.delta(foo) * (1 + scale[:, None]) + shift[:, None]
        return (foo + qux["two"][:, None] if flag else foo), c


def test_any_names_and_structures_work_by_dataflow_alone() -> None:
    model = randomized(_Oddly())
    roles = {"foo": "live", "bar": "step", "qux": "request"}
    sampler = optimize_sampler(model, 4, timesteps=torch.tensor([999, 500, 20, 1]), roles=roles, mode="eager")
    for _ in range(2):
        qux = {"one": torch.randn(2, 6), "two": torch.randn(2, 12)}
        for t in sampler.timesteps:
            foo, bar = torch.randn(2, 4, 12), t.expand(2)
            with torch.no_grad():
                expected = model(foo, bar=bar, qux=qux)
            got = sampler(foo, bar=bar, qux=qux)
            assert isinstance(got, tuple) and all(map(torch.equal, got, expected))
    assert "bar=step" in str(sampler.report) and "guessed" not in str(sampler.report)


def test_roles_are_guessed_from_shapes_when_names_tell_nothing() -> None:
    class Anonymous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = random_dit()

        def forward(self, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
            out: Tensor = self.inner(a, b, d)
            return out

    sampler = optimize_sampler(Anonymous().eval(), N_STEPS, mode="eager")
    assert difference(sampler, torch.randn(2, 1, 8, 8), sampler.timesteps[3].expand(2), torch.tensor([4, 7])) == 0
    assert "a=live (guessed), b=step (guessed), d=request (guessed)" in str(sampler.report)


def test_serial_guidance_alternates_between_two_requests_without_computing_them_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    y, null = torch.tensor([3, 5]), torch.tensor([10, 10])
    sampler.prepare((torch.randn(2, 1, 8, 8), sampler.timesteps[:1].expand(2), y))
    table = next(iter(sampler._programs.values())).table
    taken: list[object] = []
    take = table.take_slot

    def counted(asked: Any) -> Any:
        taken.append(asked)
        return take(asked)

    monkeypatch.setattr(table, "take_slot", counted)
    for t in sampler.timesteps:
        x = torch.randn(2, 1, 8, 8)
        assert difference(sampler, x, t.expand(2), y) == 0
        assert (
            difference(sampler, x, t.expand(2), null.clone()) == 0
        )  # equal numbers in a new tensor are the same request
    assert len(taken) == 1


def test_a_request_changed_in_place_is_a_new_request() -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    x, t, y = torch.randn(2, 1, 8, 8), sampler.timesteps[:1].expand(2), torch.tensor([1, 2])
    assert difference(sampler, x, t, y) == 0
    y.fill_(7)
    assert difference(sampler, x, t, y) == 0


def test_steps_may_come_in_any_order_and_repeat() -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    y = torch.tensor([1, 2])
    for i in (5, 5, 0, 7, 6, 6, 3, 3):  # Heun repeats, image-to-image starts in the middle
        assert difference(sampler, torch.randn(2, 1, 8, 8), sampler.timesteps[i].expand(2), y) == 0


def test_a_zero_dimensional_timestep_and_equal_entries_of_a_schedule_work() -> None:
    sampler = optimize_sampler(randomized(Scalar()), 3, timesteps=[1.0, 0.5, 0.5], mode="eager")
    for t in sampler.timesteps:
        assert difference(sampler, torch.randn(2, 4), t) == 0
    assert sampler.sample(torch.randn(2, 4)).shape == (2, 4)


def test_a_timestep_outside_a_fixed_schedule_is_served_by_the_whole_model_and_said_once() -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, timesteps=torch.linspace(1, 0, N_STEPS + 1)[:-1], mode="eager")
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="not in the sampler's schedule"):
        assert difference(sampler, x, torch.tensor([0.123, 0.123]), y) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference(sampler, x, torch.tensor([0.456, 0.456]), y) == 0
        assert difference(sampler, x, torch.tensor([0.5, 0.5]), y) == 0


def test_sample_is_the_euler_loop_over_the_model() -> None:
    model = random_dit()
    sampler = optimize_sampler(model, N_STEPS, mode="eager")
    noise, y, null = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([10, 10])
    ends = [*sampler.timesteps.double().tolist(), 0.0]
    plain, guided = noise, noise
    with torch.no_grad():
        for now, then in itertools.pairwise(ends):
            t = torch.full((2,), now)
            plain = plain - (now - then) * model(plain, t, y)
            v, v_null = model(guided, t, y), model(guided, t, null)
            guided = guided - (now - then) * (v_null + 2.0 * (v - v_null))
    assert torch.equal(sampler.sample(noise, y), plain)
    assert torch.equal(sampler.sample(noise, y=y), plain)
    assert torch.equal(sampler.sample(noise, y, guidance_scale=2.0, unconditional=null), guided)


def test_batched_mode_states_its_difference() -> None:
    times = torch.linspace(1, 0, N_STEPS + 1)[:-1]
    sampler = optimize_sampler(random_dit(), N_STEPS, timesteps=times, mode="eager", conditioning=Batched())
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    exact = copy.deepcopy(sampler.model).double()
    with torch.no_grad():
        noise = max(
            float((exact(x.double(), t.double().expand(3), y) - sampler.model(x, t.expand(3), y)).abs().max())
            for t in sampler.timesteps
        )
    # Another order of summation in fp32's matrix products: each side is about as far from fp64 as the model is.
    for t in sampler.timesteps:
        assert difference(sampler, x, t.expand(3), y) < 4 * noise
    measured = next(iter(sampler._programs.values())).table.measured_difference
    assert measured is not None and 0 <= measured < 4 * noise
    assert "batched rows are within" in str(sampler.report)


def test_another_batch_is_another_program_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_compile._sampler.programs.MAX_PROGRAMS", 2)
    sampler = optimize_sampler(random_dit(num_classes=None, depth=1), 2, mode="eager")
    with pytest.warns(UserWarning, match="more than 2 combinations"):
        for batch in (1, 2, 3):
            assert difference(sampler, torch.randn(batch, 1, 8, 8), sampler.timesteps[:1].expand(batch)) == 0
    assert len(sampler._programs) == 2


def test_autocast_is_traced_and_not_applied_twice() -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(sampler, x, sampler.timesteps[2].expand(2), y) == 0
    assert difference(sampler, x, sampler.timesteps[2].expand(2), y) == 0


def test_a_region_without_autocast_stays_without_when_the_table_is_filled() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(1, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                scale = self.early(t[:, None] * 1000) + y
                scale = self.late(scale)
            out: Tensor = self.late(x) * scale
            return out

    sampler = optimize_sampler(randomized(Careful()), 4, mode="eager")
    y = torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in sampler.timesteps:
            assert difference(sampler, torch.randn(2, 64), t.expand(2), y) == 0


def test_calls_inside_and_outside_inference_mode_share_their_tables() -> None:
    sampler = optimize_sampler(random_dit(), 2, mode="eager")
    x, t, y = torch.randn(2, 1, 8, 8), sampler.timesteps[:1].expand(2), torch.tensor([1, 2])
    with torch.inference_mode():
        assert difference(sampler, x, t, y) == 0
        assert difference(sampler, x.clone(), t.clone(), y.clone() + 1) == 0
    assert difference(sampler, x, t, y + 2) == 0
    assert difference(sampler, x, t, y) == 0


def test_compiled_by_inductor_it_agrees_with_the_model() -> None:
    sampler = optimize_sampler(random_dit(depth=1), 2, mode="default")
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    for t in sampler.timesteps:
        scale = float(sampler.model(x, t.expand(2), y).detach().abs().max())
        assert difference(sampler, x, t.expand(2), y) < 1e-5 * scale  # fp32; Inductor fuses, so it rounds elsewhere


def test_attributes_of_the_model_are_the_samplers() -> None:
    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    assert sampler.num_classes == 10
    with pytest.raises(AttributeError):
        _ = sampler.nothing_of_the_kind


def test_the_body_takes_no_timestep_and_its_graph_waits_for_nothing() -> None:
    from fusion_compile.passes import find_host_syncs

    sampler = optimize_sampler(random_dit(), N_STEPS, mode="eager")
    sampler.prepare((torch.randn(2, 1, 8, 8), sampler.timesteps[:1].expand(2), torch.tensor([1, 2])))
    program = next(iter(sampler._programs.values()))
    assert [n.name for n in program._body_graph.graph.find_nodes(op="placeholder")] == ["x"]
    assert find_host_syncs(program._body_graph) == ()
    before, after = sampler.report.programs[0].launches
    assert after < before


def _call(sampler: Sampler) -> Tensor:
    out: Tensor = sampler(torch.randn(2, 1, 8, 8), sampler.timesteps[:1].expand(2), torch.tensor([1, 2]))
    return out


REFUSALS: list[tuple[str, Any]] = [
    ("training mode", lambda: optimize_sampler(random_dit().train(), 4)),
    ("needs \\[4\\]", lambda: optimize_sampler(random_dit(), 4, timesteps=[1.0, 0.5])),
    ("at least one step", lambda: optimize_sampler(random_dit(), 0)),
    ("use 'trajectory', 'always' or 'never'", lambda: optimize_sampler(random_dit(), 4, verify="often")),  # type: ignore[arg-type]
    ("mode='fast' is not known", lambda: optimize_sampler(random_dit(), 4, mode="fast")),
    ("does not take", lambda: optimize_sampler(random_dit(), 4, roles={"time": "step"})),
    (
        "use 'step', 'request' or 'live'",
        lambda: _call(optimize_sampler(random_dit(), 4, roles={"t": "now"}, mode="eager")),
    ),
    (
        "no argument is the timestep",
        lambda: _call(optimize_sampler(random_dit(), 4, roles={"t": "request"}, mode="eager")),
    ),
    ("no argument is live", lambda: _call(optimize_sampler(random_dit(), 4, roles={"x": "request"}, mode="eager"))),
    (
        "holds fractions",
        lambda: optimize_sampler(random_dit(), 4, timesteps=[0.9, 0.5, 0.2, 0.1], mode="eager")(
            torch.randn(2, 1, 8, 8), torch.tensor([1, 1]), torch.tensor([1, 2])
        ),
    ),
    (
        "requires a gradient",
        lambda: optimize_sampler(random_dit(), 4, mode="eager")(
            torch.randn(2, 1, 8, 8, requires_grad=True), torch.ones(2), torch.tensor([1, 2])
        ),
    ),
    (
        "needs unconditional",
        lambda: optimize_sampler(random_dit(), 4, mode="eager").sample(
            torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), guidance_scale=2.0
        ),
    ),
    (
        "t in \\[0, 1\\]",
        lambda: optimize_sampler(random_dit(), 1, timesteps=[999.0], mode="eager").sample(
            torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
        ),
    ),
]


@pytest.mark.parametrize(("sentence", "act"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_bad_input_is_refused_with_a_sentence(sentence: str, act: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        act()


def test_old_names_are_refused_with_the_new_ones() -> None:
    sampler = optimize_sampler(random_dit(), 4, mode="eager")
    with pytest.raises(AttributeError, match=r"free_hoisted_weights is called release_weights\(to='drop'\) now"):
        _ = sampler.free_hoisted_weights
    with pytest.raises(AttributeError, match=r"reports is called report\.programs now"):
        _ = sampler.reports
    for old in ("exact", "rank", "t_range"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{old}'"):
            optimize_sampler(random_dit(), 4, **{old: 1})  # type: ignore[arg-type]


def test_steps_may_be_left_out_where_timesteps_are_given_and_inputs_may_have_names() -> None:
    inputs = {"x": torch.randn(2, 1, 8, 8), "t": torch.full((2,), 0.5), "y": torch.tensor([1, 2])}
    for given in (inputs, tuple(inputs.values()), ((inputs["x"],), {"t": inputs["t"], "y": inputs["y"]})):
        sampler = optimize_sampler(random_dit(), timesteps=[1.0, 0.5], example_inputs=given, mode="eager")
        assert sampler.timesteps.tolist() == [1.0, 0.5] and len(sampler.report.programs) == 1
        assert difference(sampler, **inputs) == 0


def test_a_model_that_cannot_be_exported_is_refused_by_name() -> None:
    class Addresses(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * (x.data_ptr() % 2 + 1) * t.sum()

    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * t.sum()

    with pytest.raises(ValueError, match="Addresses could not be exported"):
        optimize_sampler(Addresses().eval(), 2, mode="eager")(torch.randn(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"writes .*calls"):
        optimize_sampler(Counts().eval(), 2, mode="eager")(torch.randn(2, 3), torch.ones(2))


def test_switching_the_model_to_training_is_noticed_at_the_next_call() -> None:
    sampler = optimize_sampler(random_dit(), 4, mode="eager")
    _call(sampler)
    sampler.model.train()
    with pytest.raises(ValueError, match="training mode"):
        _call(sampler)
