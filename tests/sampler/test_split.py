"""A denoiser's graph split for one call."""

from __future__ import annotations

import inspect

import torch

from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import trace_denoiser
from fusion_compile._sampler.graph.roles import assign_roles
from fusion_compile._sampler.split import SplitDenoiser, binding_times_of, split_denoiser
from fusion_compile.passes import BindingTime, format_graph
from tests.small_denoiser import X, Y, denoiser

T = torch.full((2,), 0.5)


def split() -> SplitDenoiser:
    model = denoiser()
    signature = inspect.signature(model.forward)
    call = take_apart(signature, (X, T, Y), {})
    roles = assign_roles(call.arguments, None)
    return split_denoiser(trace_denoiser(model, call), call, roles, n_steps=5, byte_budget=1 << 20)


def test_arguments_are_found_by_their_role() -> None:
    made = split()
    assert (made.positions("live"), made.positions("step"), made.positions("request")) == ([0], [1], [2])
    assert made.timesteps == (T,) and made.step_inputs == ("timestep",)
    assert made.times == {"x": BindingTime.LIVE, "timestep": BindingTime.STEP, "y": BindingTime.REQUEST}
    assert binding_times_of(made.traced, made.call, made.roles) == made.times


def test_the_body_reads_the_latent_and_weights_and_no_timestep() -> None:
    made = split()
    assert {"x"} == {name for name in made.hoisted.body.inputs if name in made.times}
    assert made.read_by(made.hoisted.body.inputs) == {"out.weight", "out.bias"}
    assert made.read_by(made.hoisted.stages[BindingTime.STEP].inputs) == {"time.weight", "time.bias"}
    assert (made.n_steps, made.byte_budget, made.rank) == (5, 1 << 20, None)


def test_the_traced_graph_stays_as_it_was() -> None:
    made = split()
    text = format_graph(made.traced.graph_module.graph)
    split_denoiser(made.traced, made.call, made.roles, n_steps=2)
    assert format_graph(made.traced.graph_module.graph) == text
