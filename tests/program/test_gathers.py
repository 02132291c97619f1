"""Tests: weights are gathered where they are used, and again for the backward."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile import _compat
from fusion_compile._program.gathers import gather_late, has_gathers


@torch.library.custom_op("fusion_compile_tests::all_gather_into_tensor", mutates_args=())
def gather(own: Tensor) -> Tensor:
    """Stands for the collective, whose name it has."""
    return torch.cat([own, own + 1])


@gather.register_fake
def _(own: Tensor) -> Tensor:
    return own.new_empty(2 * own.shape[0], *own.shape[1:])


def step(own: Tensor, other: Tensor, x: Tensor, rounds: int = 1) -> Tensor:
    with _compat.region("communication"):
        first, second = gather(own), gather(other)
    total = torch.zeros(())
    for _ in range(rounds):
        with _compat.region("forward"):
            hidden = torch.tanh(x @ first[0].t())
            out = hidden @ torch.cat([second[1:2].reshape(2, 2), first[1]])[:2].t()
        with _compat.region("backward"):
            total = total + (out @ second[1] * (1 - hidden.square())) @ first[0]
    with _compat.region("communication"):
        rows = gather(total.reshape(1, -1))
    return rows.sum(0) + total.sum()


def captured(rounds: int = 1) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    given = tuple(torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    inputs = (*given, torch.randn(3, 2))
    with torch.fx.traceback.preserve_node_meta():
        return make_fx(lambda own, other, x: step(own, other, x, rounds))(*inputs), inputs


def calls(graph: fx.GraphModule) -> list[str]:
    names = {"all_gather": "gather", "tanh": "tanh", "mm": "product"}
    found = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [short for name in found for part, short in names.items() if part in name]


def test_each_piece_is_gathered_before_its_first_use_and_again_for_the_backward() -> None:
    graph, inputs = captured()
    wanted = graph(*inputs)
    assert calls(graph) == ["gather", "gather", "product", "tanh", "product", "product", "product", "gather"]
    assert gather_late(graph.graph) == 2
    graph.graph.lint()
    graph.recompile()
    once = ["gather", "product", "tanh", "gather", "product"]
    assert calls(graph) == [*once, "gather", "product", "gather", "product", "gather"]  # the last is not of weights
    assert torch.equal(graph(*inputs), wanted)


def test_every_micro_batch_gathers_for_itself() -> None:
    graph, inputs = captured(rounds=3)
    wanted = graph(*inputs)
    assert gather_late(graph.graph) == 2 * (6 - 1)
    graph.recompile()
    assert torch.equal(graph(*inputs), wanted)


def test_a_second_run_changes_nothing() -> None:
    graph, _ = captured()
    gather_late(graph.graph)
    before = calls(graph)
    assert gather_late(graph.graph) == 0
    assert calls(graph) == before


def test_a_graph_without_gathers_stays_as_it_is() -> None:
    graph = make_fx(lambda x: x.tanh() + 1)(torch.ones(2))
    before = str(graph.graph)
    assert not has_gathers(graph.graph) and gather_late(graph.graph) == 0
    assert str(graph.graph) == before
    assert has_gathers(captured()[0].graph)
