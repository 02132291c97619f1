"""Real models: what is served is what they compute, their time and text leave the loop, and the weights can go."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusion_compile._sampler.graph import by_shape
from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import DenoiserGraph, trace_denoiser
from fusion_compile._sampler.graph.roles import BINDING_TIMES, assign_roles
from fusion_compile.passes import exchange_rates, find_host_syncs, hoist_time_conditioning
from fusion_compile.sampler import Batched, Sampler, optimize_sampler
from tests.models.cases import N_STEPS, NAMES, Case, case
from tests.models.tiny import tiny_call, tiny_model

pytestmark = [
    # diffusers imports its own deprecated names,
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning"),
    # Z-Image fills its rotary table at its own first call, so that the sampler is built again,
    pytest.mark.filterwarnings("ignore:rope_embedder.*the sampler is built again:UserWarning"),
    # and Mochi asks autocast for float32, which on a CPU is refused.
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]

BATCHED_BOUND = 1e-5
"""Of the largest output: fp32 rounds by 6e-8, sums here have at most 1,000 terms, and two blocks pass errors on."""


@pytest.fixture(autouse=True)
def one_export_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export takes most of the time of these tests, and gives the same graph for the same model and call."""
    trace = trace_denoiser

    def cached(model: Any, call: Any, reads: Any = ()) -> DenoiserGraph:
        if reads:  # other values make another graph
            return trace(model, call, reads)
        key = (id(model), call.key.sizes, call.key.constants)
        if key not in _TRACED:
            _TRACED.clear()
            _TRACED[key] = trace(model, call)
        return _TRACED[key]

    monkeypatch.setattr(by_shape, "trace_denoiser", cached)


_TRACED: dict[Any, DenoiserGraph] = {}


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def difference(got: Any, expected: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(tensors_of(got), tensors_of(expected), strict=True))


def calls(c: Case) -> Iterator[dict[str, Any]]:
    """Two requests at every step of the schedule."""
    for request in (c.call(), c.call()):
        for i in range(N_STEPS):
            yield c.at(request, i)


def sampler_of(c: Case, **options: Any) -> Sampler:
    made: dict[str, Any] = {"timesteps": c.schedule, "mode": "eager", **options}
    return optimize_sampler(c.model, N_STEPS, **made)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.covering(
    "examples/dit.py", "published SiT", "DiT", "PixArt-alpha", "SD3", "Flux", "Wan", "HunyuanVideo", "Z-Image"
)
def test_model(name: str) -> None:
    """Exact rows are bitwise the model's; batched rows near them; the weights of both stages can be dropped."""
    c = case(name)
    exact, batched = sampler_of(c), sampler_of(c, conditioning=Batched())
    expected = []
    for arguments in calls(c):
        output = exact(**arguments)  # first: what a trace leaves in a model that was never called shows in its own call
        with torch.no_grad():
            expected.append((arguments, c.model(**arguments)))
        assert type(output) is type(expected[-1][1])
        assert difference(output, expected[-1][1]) == 0
    largest = max(float(t.abs().max()) for _, out in expected for t in tensors_of(out))
    assert 0 < largest < 1e3
    furthest = max(difference(batched(**arguments), out) for arguments, out in expected)
    assert furthest <= BATCHED_BOUND * largest
    assert (batched.report.programs[0].measured_difference == 0) <= (furthest == 0)

    report = exact.report.programs[0]
    assert report.nodes["step"] + report.nodes.get("step_request", 0) > 0
    assert report.launches[1] < report.launches[0]
    (program,) = exact._programs.values()
    owners = [described.split()[0] for described in report.inputs]
    assert {owners[i] for i in program._live} == {c.live}  # no timestep, and nothing of the request

    read_once = report.weight_bytes["table"] + report.weight_bytes["prologue"]
    copies = program.copies_of(program.early_names)  # cropped positions and the like, which the table holds
    assert exact.release_weights(to="drop") == read_once - copies > 0
    for arguments, out in expected[N_STEPS:]:
        assert difference(exact(**arguments), out) == 0
    with pytest.raises(RuntimeError, match="restore_weights"):
        exact(**c.call())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Mochi"])  # it asks autocast for its own device
@pytest.mark.covering("examples/dit.py", "published SiT", "DiT", "PixArt-sigma", "Chroma", "LTX")
def test_on_a_device_of_its_own_the_loop_reads_nothing_from_the_cpu(name: str) -> None:
    """Else it could not be one CUDA graph: Qwen-Image keeps its frequencies on the CPU and copies them at each call.
    The meta device stands for the GPU."""
    c = case(name)
    model = copy.deepcopy(c.model).to("meta")
    arguments = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), c.at(c.call(), 0))
    signature = inspect.signature(model.forward)
    call = take_apart(signature, (), arguments)
    roles = assign_roles(call.arguments, None).by_argument
    traced = trace_denoiser(model, call)
    times = {n: BINDING_TIMES[roles[owner]] for n, owner in zip(traced.inputs, call.owners, strict=True)}
    rates = exchange_rates(torch.device("cuda"))
    hoisted = hoist_time_conditioning(traced.graph_module, times, n_steps=N_STEPS, exchange=rates)
    read = [node for node in hoisted.body.graph_module.graph.find_nodes(op="placeholder") if node.users]
    assert read and {node.meta["val"].device.type for node in read} == {"meta"}
    assert find_host_syncs(hoisted.body.graph_module) == ()


def test_a_guess_that_is_wrong_for_a_caller_is_overridden() -> None:
    """Guidance that changes from step to step is no request: as one it would have a table computed at each change."""
    c = case("Flux")
    sampler = sampler_of(c, roles={"guidance": "live"})
    request = c.call()
    for i in range(N_STEPS):
        arguments = c.at(request, i) | {"guidance": torch.full((2,), 1.0 + i)}
        with torch.no_grad():
            assert difference(sampler(**arguments), c.model(**arguments)) == 0
    assert "guidance=live" in str(sampler.report) and "guidance=live (guessed)" not in str(sampler.report)


def test_another_sampler_of_the_same_model_changes_nothing_for_the_first() -> None:
    """Export leaves copies of a module's lists and tuples in their places, which are no change of the model."""
    c = case("Flux")
    first = sampler_of(c)
    arguments = c.call()
    expected = first(**arguments)
    first.release_weights(to="cpu")
    _TRACED.clear()
    optimize_sampler(copy.copy(c.model), N_STEPS, timesteps=c.schedule, mode="eager")(**arguments)
    assert difference(first(**arguments), expected) == 0


def test_lumina2_is_specialised_on_the_lengths_of_its_texts() -> None:
    """It reads its mask with ``tolist()``, and was refused."""
    model = tiny_model("Lumina2")
    sampler = optimize_sampler(model, N_STEPS, mode="eager")
    for lengths in ((6, 4), (3, 5)):
        arguments = tiny_call("Lumina2", model, N_STEPS).arguments
        arguments["encoder_attention_mask"] = torch.arange(6) < torch.tensor(lengths)[:, None]
        for t in (0.9, 0.3):
            arguments["timestep"] = torch.full_like(arguments["timestep"], t)
            with torch.no_grad():
                assert difference(sampler(**arguments), model(**arguments)) == 0
    assert len(sampler.report.programs) == 2


def test_bfloat16_is_bitwise_the_model_too() -> None:
    c = case("DiT")
    model = copy.deepcopy(c.model).to(torch.bfloat16)
    sampler = optimize_sampler(model, N_STEPS, timesteps=c.schedule, mode="eager")
    for arguments in calls(c):
        arguments = arguments | {c.live: arguments[c.live].bfloat16()}
        with torch.no_grad():
            assert difference(sampler(**arguments), model(**arguments)) == 0
