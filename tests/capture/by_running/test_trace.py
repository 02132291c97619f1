"""Capture by running: the graph computes what the function does, whatever Python it is written in."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._capture.by_running.trace import constants, lift_constants, run_on_fakes, written_constants


def test_the_graph_computes_what_the_function_does_on_other_values() -> None:
    def f(x: Tensor, w: Tensor) -> list[Tensor]:
        logging.getLogger("nobody").warning("shape %s", tuple(x.shape))
        loss = F.gelu(x @ w).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, [w])]

    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    graph = run_on_fakes(f, {"batch/0": x, "params/w": w})
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    for got, wanted in zip(graph(x, w), f(x, w), strict=True):
        assert torch.equal(got, wanted)


def test_every_placeholder_carries_its_label_and_every_node_the_users_line() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin()

    graph = run_on_fakes(f, {"batch/0": torch.ones(2)})
    assert [n.meta["label"] for n in graph.graph.find_nodes(op="placeholder")] == ["batch/0"]
    (sin,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert f"{__file__}" in sin.meta["stack_trace"] and "return x.sin()" in sin.meta["stack_trace"]


def test_a_write_to_an_input_is_in_the_graph() -> None:
    def f(x: Tensor) -> list[Tensor]:
        x.add_(1)
        return []

    graph = run_on_fakes(f, {"x": torch.zeros(2)})
    x = torch.zeros(2)
    graph(x)
    assert torch.equal(x, torch.ones(2))


def test_tracing_changes_no_input_and_draws_no_random_number() -> None:
    x, before = torch.zeros(4), torch.get_rng_state()
    run_on_fakes(lambda x: x.add_(torch.rand(4)), {"x": x})
    assert torch.equal(x, torch.zeros(4)) and torch.equal(torch.get_rng_state(), before)


def test_an_lstm_is_captured() -> None:
    lstm = nn.LSTM(3, 5, batch_first=True)
    x = torch.randn(2, 7, 3)
    graph = run_on_fakes(lambda x: lstm(x)[0], {"x": x})
    # oneDNN's fused LSTM and the unfused one differ by rounding.
    torch.testing.assert_close(graph(x), lstm(x)[0])


def test_what_is_closed_over_is_a_constant_and_stays_live() -> None:
    teacher = torch.ones(2)
    graph = run_on_fakes(lambda x: x * teacher, {"x": torch.ones(2)})
    assert [t is teacher for t in constants(graph).values()] == [True]
    teacher.fill_(3)
    assert torch.equal(graph(torch.ones(2)), torch.full((2,), 3.0))


def test_a_constant_that_the_graph_writes_is_found_through_views() -> None:
    count, seen = torch.zeros(2, 2), torch.zeros(3)

    def f(x: Tensor) -> Tensor:
        count[0].view(-1).add_(x.mean())
        return x + seen.sum()

    assert [t is count for t in written_constants(run_on_fakes(f, {"x": torch.ones(2)}))] == [True]


def test_a_constant_left_by_an_earlier_trace_is_refused() -> None:
    left: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        left.append(x * 2)
        return x + left[0]

    run_on_fakes(f, {"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"a torch.float32 \[2\] tensor without data"):
        run_on_fakes(f, {"x": torch.ones(2)})


def test_lifted_constants_are_read_at_every_run_and_literals_stay() -> None:
    teacher = torch.ones(2)
    graph = run_on_fakes(lambda x: x * teacher + torch.tensor([1.0, 2.0]) + teacher, {"x": torch.ones(2)})
    (lifted,) = lift_constants(graph)
    assert lifted is teacher
    assert torch.equal(graph(torch.ones(2), torch.full((2,), 3.0)), torch.tensor([7.0, 8.0]))
