"""Binding times of a graph's nodes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import BindingTime, binding_times
from fusion_compile.passes._dependence import why_at_every_call

STEP, REQUEST, LIVE = BindingTime.STEP, BindingTime.REQUEST, BindingTime.LIVE
ROLES = {"t_1": STEP, "y_1": REQUEST, "x_1": LIVE}


def labelled(x: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (x + y.exp()) * torch.tanh(t.sin() + y.exp()) + t.sin() @ w


def test_binding_time_is_the_union_of_what_a_value_depends_on() -> None:
    graph_module = make_fx(labelled, tracing_mode="fake")(*torch.randn(3, 2, 4), torch.randn(4, 4))
    times = {node.name: time.name for node, time in binding_times(graph_module.graph, ROLES).items()}
    assert times["sin"] == "STEP" and times["exp"] == "REQUEST" and times["tanh"] == "STEP_REQUEST"
    assert times["w_1"] == "CONST" and times["mul"] == "LIVE"
    assert STEP.join(REQUEST) is BindingTime.STEP_REQUEST and REQUEST.join(LIVE) is LIVE


def test_only_step_and_step_request_differ_from_step_to_step() -> None:
    assert {time.name for time in BindingTime if time.per_step} == {"STEP", "STEP_REQUEST"}


def test_random_numbers_writes_and_sizes_of_data_are_known_at_the_call_alone() -> None:
    def impure(t: Tensor) -> Tensor:
        noise = torch.rand_like(t)
        return (t.sin().add_(1) * noise).sum() + t.nonzero().sum()

    graph = make_fx(impure, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(3)).graph
    times = {node.name: time for node, time in binding_times(graph, {"t_1": STEP}).items()}
    assert times["sin"] is STEP and {times[name] for name in ("rand_like", "add_", "nonzero")} == {LIVE}
    why = {node.name: why_at_every_call(node) for node in graph.nodes if node.op == "call_function"}
    assert why["rand_like"] == "rand_like draws random numbers" and why["sin"] is None
    assert why["nonzero"] == "nonzero gives a tensor whose size depends on data"
