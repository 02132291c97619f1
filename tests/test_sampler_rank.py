"""conditioning=Rank(…): any timestep of a range is served without a table, as closely as the report says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dit import DiT
from torch import Tensor, nn

from fusion_compile._sampler.graph import by_shape
from fusion_compile._sampler.graph.call import Call, CallKey
from fusion_compile._sampler.graph.export import DenoiserGraph, trace_denoiser
from fusion_compile._sampler.rank.fit import N_SAMPLES
from fusion_compile._sampler.rank.range_rows import RangeRows
from fusion_compile._sampler.rows import Seen
from fusion_compile.sampler import Rank, Sampler, optimize_sampler
from tests.models.tiny import tiny_call, tiny_model
from tests.oracles import rank_conditioning as twin
from tests.small_denoiser import Scalar

N_STEPS = 4
X, Y, OTHER = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
T = torch.tensor([0.123, 0.123])


@lru_cache
def smooth_dit(num_classes: int | None = 10) -> DiT:
    """Random, with sinusoids of at most 10 rad over [0, 1], as a trained time MLP takes little of the faster ones.

    One for all tests, which leave its weights as they were: exporting it takes longer than what is tested.
    """
    model = DiT(hidden_size=64, depth=1, num_heads=2, num_classes=num_classes, time_scale=10.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def one_export_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph for the same model and call."""

    def traced(model: nn.Module, call: Call) -> DenoiserGraph:
        if (model, call.key) not in _TRACED:
            _TRACED[model, call.key] = trace_denoiser(model, call)
        return _TRACED[model, call.key]

    monkeypatch.setattr(by_shape, "trace_denoiser", traced)


_TRACED: dict[tuple[nn.Module, CallKey], DenoiserGraph] = {}


def make(model: nn.Module, rank: int = 16, covers: tuple[float, float] = (0, 1), **options: Any) -> Sampler:
    return optimize_sampler(model, N_STEPS, conditioning=Rank(rank, covers), mode="eager", **options)


def difference(sampler: Sampler, *call: Tensor, model: nn.Module | None = None) -> float:
    """Of the outputs, as a share of the model's."""
    with torch.no_grad():
        got, expected = sampler(*call), (model or sampler.model)(*call)
    return float((got - expected).norm() / expected.norm())


def measured(sampler: Sampler) -> float:
    rank = sampler.report.programs[0].rank
    assert rank is not None and rank.measured_difference is not None
    return rank.measured_difference


class _OnlyConditioning(nn.Module):
    """The output is a layer's, so that what the report says of layers can be seen from outside."""

    def __init__(self, labels: bool) -> None:
        super().__init__()
        inner = smooth_dit(10 if labels else None)
        self.t_embedder, self.y_embedder = inner.t_embedder, inner.y_embedder
        self.layer = nn.Linear(64, 96)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.t_embedder(t)
        c = c if self.y_embedder is None else c + self.y_embedder(y)
        out: Tensor = self.layer(F.silu(c)) + 0 * x
        return out


@lru_cache
def only_conditioning(labels: bool) -> nn.Module:
    """One for all tests, as `smooth_dit`."""
    return _OnlyConditioning(labels).eval()


@pytest.mark.parametrize("labels", [False, True], ids=["time alone", "labels"])
@pytest.mark.parametrize("rank", [3, 8])
def test_timesteps_never_sampled_are_within_what_the_report_says(labels: bool, rank: int) -> None:
    sampler = make(only_conditioning(labels), rank)
    times = [*torch.rand(60).tolist(), 0.0, 1.0]
    x = torch.zeros(2, 1)
    worst = max(difference(sampler, x, torch.full((2,), t), *[Y] * labels) for t in times)
    # measured where the fit is worst halfway between samples; in between it is hardly worse, and at the ends, which
    # are samples without a neighbour on one side, up to twice
    assert 0.1 * measured(sampler) < worst < 2 * measured(sampler)


def _layers_by_twin(model: DiT, rank: int, y: Tensor | None) -> DiT:
    """`model` in float64 whose modulation layers know only the subspace that the twin fits."""
    model = copy.deepcopy(model).double()
    curve: list[np.ndarray] = []

    def g(t: Tensor) -> np.ndarray:
        c = model.t_embedder(t.double().expand(2))
        return F.silu(c if y is None else c + model.y_embedder(y)).detach().numpy()  # type: ignore[misc]

    curve = [g(t) for t in torch.linspace(0, 1, N_SAMPLES)]
    mean, basis = twin.fit(np.stack(curve), rank)

    class Known(nn.Module):
        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            super().__init__()
            self.weight, self.bias = weight.detach().numpy(), bias.detach().numpy()

        def forward(self, g: Tensor) -> Tensor:
            return torch.from_numpy(twin.layer(g.detach().numpy(), self.weight, self.bias, mean, basis))

    for owner in (*model.blocks, model.final_layer):
        layer = owner.adaLN_modulation[1]
        owner.adaLN_modulation[1] = Known(layer.weight, layer.bias)
    return model


@pytest.mark.parametrize("y", [None, Y], ids=["time alone", "labels"])
def test_it_is_the_model_whose_layers_know_only_the_twins_subspace(y: Tensor | None) -> None:
    model = smooth_dit(None if y is None else 10)
    sampler, given = make(model, rank=3), [] if y is None else [y]
    by_twin = _layers_by_twin(model, 3, y)
    for t in (torch.tensor([0.123, 0.123]), torch.tensor([0.2, 0.9])):  # a timestep for each image is no trouble
        with torch.no_grad():
            expected = by_twin(X.double(), t.double(), *given)
            got = sampler(X, t, *given)
            rounded, wrong = ((out.double() - expected).norm() / expected.norm() for out in (got, model(X, t, *given)))
        assert rounded < 1e-5 < 1e-3 < wrong  # fp32 against float64; the truncation itself is far larger


@pytest.mark.parametrize("num_classes", [None, 10], ids=["time alone", "labels"])
def test_error_falls_with_rank_to_rounding(num_classes: int | None) -> None:
    model = smooth_dit(num_classes)
    given = [] if num_classes is None else [Y]
    errors = [difference(make(model, rank), X, T, *given) for rank in (2, 8, 40)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-5  # fp32


def test_a_rank_as_large_as_the_number_of_timesteps_loses_nothing() -> None:
    """Seven integers and no more: their curve spans six directions, however it turns."""
    model = smooth_dit()
    sampler = make(model, rank=12, covers=(0, 6))
    for t in range(7):
        assert difference(sampler, X, torch.full((2,), t), Y) < 1e-5  # fp32
    assert measured(sampler) < 1e-5


def test_no_timestep_has_a_row_and_the_body_takes_it() -> None:
    sampler = make(smooth_dit())
    for t in torch.rand(3 * 4 * N_STEPS):
        sampler(X, t.expand(2), Y)
    program = next(iter(sampler._programs.values()))
    assert {"x", "t"} == {str(n.target) for n in program._body_graph.graph.find_nodes(op="placeholder")}
    assert not any(buffer.time.per_step for buffer in program.table._buffers) and len(program.rows) == 1


def test_the_report_says_what_was_done_and_not_that_it_is_exact() -> None:
    model = smooth_dit()
    sampler = make(model, rank=5)
    sampler(X, T, Y)
    done = sampler.report.programs[0].rank
    assert done is not None
    modulation = [p for name, p in model.named_parameters() if "adaLN" in name]
    outs = 6 * 64 + 2 * 64
    assert done.layers == 2 and done.weight_bytes == sum(4 * p.numel() for p in modulation)
    assert done.factor_bytes == 4 * (5 * outs + 2 * outs + 2 * 64 + 64 * 5)
    text = str(sampler.report)
    assert "approximate" in text and "exact\n" not in text
    assert "rank        5: 2 layers read" in text and "t in [0, 1]" in text
    assert "factored layers read; it stays exact." in text


def test_sample_is_euler_at_timesteps_that_the_body_computes() -> None:
    model = smooth_dit()
    noise = torch.randn(2, 1, 8, 8)
    exact = optimize_sampler(model, N_STEPS, mode="eager").sample(noise, Y, guidance_scale=2.0, unconditional=OTHER)
    got = make(model, rank=48).sample(noise, Y, guidance_scale=2.0, unconditional=OTHER)
    assert (got - exact).norm() < 1e-5 * exact.norm()  # fp32, four steps


@pytest.mark.parametrize("num_classes", [None, 10], ids=["time alone", "labels"])
def test_freed_weights_are_those_that_were_factored_and_any_timestep_is_served_on(num_classes: int | None) -> None:
    model = smooth_dit(num_classes)
    untouched, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    given = [] if num_classes is None else [Y]
    sampler = make(model, rank=40)
    sampler(X, T, *given)
    rank = sampler.report.programs[0].rank
    assert rank is not None
    labels = 0 if num_classes is None else model.y_embedder.embedding_table.weight.nbytes  # type: ignore[union-attr]
    assert sampler.release_weights(to="drop") == rank.weight_bytes + labels - rank.factor_bytes  # which stay instead
    assert model.blocks[0].adaLN_modulation[1].weight.numel() == 0  # type: ignore[index, union-attr]
    for t in torch.rand(5):
        assert difference(sampler, X, t.expand(2), *given, model=untouched) < 1e-4
    if num_classes is not None:
        with pytest.raises(RuntimeError, match="a new request needs weights"):
            sampler(X, T, OTHER)
    with pytest.raises(RuntimeError, match=r"outside of \[0, 1\].*cannot serve it"):
        sampler(X, T + 1, *given)
    sampler.restore_weights(state)
    assert difference(sampler, X, T, *given, model=untouched) < 1e-4
    if num_classes is not None:
        assert difference(sampler, X, T, OTHER, model=untouched) < 1e-4


def test_what_a_new_request_needs_can_be_kept() -> None:
    state = copy.deepcopy(smooth_dit(None).state_dict())
    sampler = make(smooth_dit(), rank=40)
    sampler(X, T, Y)
    assert sampler.release_weights(to="drop", keep_prologue=True) == 0  # every factor depends on the label
    assert difference(sampler, X, T, OTHER) < 1e-4
    alone = make(smooth_dit(None), rank=40)
    alone(X, T)
    assert alone.release_weights(to="drop", keep_prologue=True) > 0
    alone.restore_weights(state)


def test_each_request_that_is_kept_has_factors_of_its_own() -> None:
    model = smooth_dit()
    state = copy.deepcopy(model.state_dict())
    sampler = make(model, rank=8)
    for y in (Y, OTHER):
        sampler(X, T, y)
    rank = sampler.report.programs[0].rank
    assert rank is not None
    labels = model.y_embedder.embedding_table.weight.nbytes  # type: ignore[union-attr]
    assert sampler.release_weights(to="drop") == rank.weight_bytes + labels - 2 * rank.factor_bytes
    sampler.restore_weights(state)


def _in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def _unseen(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


@pytest.mark.parametrize("change", [_in_place, _unseen])
@pytest.mark.parametrize("num_classes", [None, 10], ids=["time alone", "labels"])
def test_factors_follow_the_weights_of_layers_and_of_what_they_read(
    num_classes: int | None, change: Callable[[nn.Parameter], None]
) -> None:
    model = smooth_dit(num_classes)
    state, given = copy.deepcopy(model.state_dict()), [] if num_classes is None else [Y]
    sampler = make(model, rank=40)
    for name in ("blocks.0.adaLN_modulation.1.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        if name not in state:
            continue
        assert difference(sampler, X, T, *given) < 1e-4
        before = measured(sampler)
        change(model.get_parameter(name))
        for _ in range(
            N_STEPS if change is _unseen else 0
        ):  # writes without a version are looked for once a trajectory
            sampler(X, T, *given)
        assert difference(sampler, X, T, *given) < 1e-4
        assert measured(sampler) != before
        model.load_state_dict(state)


def test_two_requests_are_kept_and_a_third_is_fitted_anew() -> None:
    sampler = make(smooth_dit(), rank=40)
    for y in (Y, OTHER, Y, OTHER, Y + 4, Y):
        assert difference(sampler, X, torch.rand(1).expand(2), y) < 1e-4


def test_a_timestep_outside_the_range_is_served_by_the_whole_model_and_said_once() -> None:
    sampler = make(smooth_dit(), rank=2)
    with pytest.warns(UserWarning, match=r"outside of \[0, 1\], which conditioning=Rank\(…\) was fitted to"):
        assert difference(sampler, X, torch.tensor([0.5, 1.5]), Y) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference(sampler, X, torch.tensor([-0.5, 0.5]), Y) == 0


def test_where_looking_costs_a_wait_a_timestep_outside_the_range_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for a GPU, on a CPU."""
    monkeypatch.setattr(RangeRows, "locate", lambda self, t, request: Seen(0))
    sampler = make(smooth_dit())
    assert sampler(X, torch.tensor([0.5, 1.5]), Y).isnan().all()
    assert difference(sampler, X, T, Y) < 0.01


def test_the_range_is_that_of_the_schedule_as_the_timesteps_dtype_rounds_it() -> None:
    model = copy.deepcopy(smooth_dit()).bfloat16()
    schedule = torch.tensor([0.999, 0.7, 0.3, 0.001])
    sampler = optimize_sampler(model, N_STEPS, timesteps=schedule, conditioning=Rank(32), mode="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 0.999 is 1 in bfloat16, and inside
        for t in schedule.bfloat16():
            assert difference(sampler, X.bfloat16(), t.expand(2), Y) < 0.05  # bfloat16: 2^-8 for each of some ten sums


def test_autocast_is_followed() -> None:
    sampler = make(smooth_dit(), rank=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(sampler, X, T, Y) < 0.05  # as above
    assert difference(sampler, X, T, Y) < 1e-3


@pytest.mark.parametrize("name", ["CogVideoX", "SD3", "AuraFlow"])
def test_transformers_of_diffusers(name: str) -> None:
    """Integer timesteps and a curve of time alone; a curve that pooled text moves; a text stream that is declined."""
    model = tiny_model(name).eval()
    call = tiny_call(name, model, N_STEPS)
    t = call.arguments["timestep"]
    high = {"CogVideoX": 4, "SD3": 4.0, "AuraFlow": 0.004}[name]  # of 1000: little, as a tiny model has few directions
    sampler = make(model, rank=4, covers=(0, high))
    for value in torch.rand(3) * high:
        arguments = {**call.arguments, "timestep": torch.full_like(t, float(value)), "return_dict": False}
        with torch.no_grad():
            got, expected = sampler(**arguments)[0], model(**arguments)[0]
        assert (got - expected).norm() < max(1e-4, 5 * measured(sampler)) * expected.norm()
    report = sampler.report.programs[0]
    assert report.rank is not None and report.rank.layers == 5 and 0 < measured(sampler) < 0.1
    assert any("rows for a batch of 2" in d.reason for d in report.declined) == (name != "CogVideoX")
    assert sampler.release_weights(to="drop") >= report.rank.weight_bytes - report.rank.factor_bytes


def test_a_model_with_nothing_to_factor_is_said_to_have_nothing() -> None:
    sampler = make(Scalar().eval(), rank=4)
    with pytest.warns(UserWarning, match=r"Rank\(4\) factors no layer of this model.* linear: rank 4 is not below"):
        assert difference(sampler, torch.randn(2, 4), torch.tensor(0.5)) == 0


def test_compiled_by_inductor_it_agrees_with_the_eager_sampler() -> None:
    model = smooth_dit()
    compiled = optimize_sampler(model, N_STEPS, conditioning=Rank(16, (0, 1)), mode="default")
    for t in (0.1, 0.7):
        call = (X, torch.tensor([t, t]), Y)
        expected = make(model)(*call)
        assert (compiled(*call) - expected).norm() < 1e-5 * expected.norm()  # fp32; Inductor rounds elsewhere
    assert compiled(X, torch.tensor([0.3, 0.4]), Y).isfinite().all()


REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("rank=0\\): a subspace has at least one dimension", lambda: Rank(0, (0, 1))),
    ("two different finite ends", lambda: Rank(8, (1, 1))),
    ("none is known; pass Rank\\(8, \\(0, 1\\)\\)", lambda: optimize_sampler(smooth_dit(), 4, conditioning=Rank(8))),
    (
        r"the range of timesteps is \[1, 1\]; pass Rank\(8, \(first, last\)\) with two values",
        lambda: optimize_sampler(smooth_dit(), timesteps=[1.0, 1.0], conditioning=Rank(8)),
    ),
]


@pytest.mark.parametrize(("sentence", "act"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_bad_input_is_refused_with_a_sentence(sentence: str, act: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=sentence):
        act()
