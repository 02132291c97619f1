"""A run of calls as a region: what goes in, what comes out, and views that stay outside."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import count_regions
from fusion_compile.passes._graph import calls
from fusion_compile.passes._region import call_region, may_be_in_a_region, run_of


def blocks(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    x = x + (x @ w).sin()
    return x + (x @ v).sin()


def trace() -> fx.GraphModule:
    return make_fx(blocks, tracing_mode="fake")(torch.randn(2, 3), torch.randn(3, 3), torch.randn(3, 3))


def test_equal_blocks_have_equal_wiring_and_inputs_of_their_own() -> None:
    nodes = calls(trace().graph)
    first, second = run_of(nodes[:3]), run_of(nodes[3:])
    assert first.wiring == second.wiring
    assert [n.name for n in first.inputs] == ["x_1", "w_1"]
    assert [n.name for n in second.inputs] == ["add", "v_1"]
    assert first.passed() == [nodes[2]] and first.given() == [2]


def test_a_region_is_called_in_the_place_of_each_run_and_gives_the_same_bits() -> None:
    graph_module = trace()
    nodes = calls(graph_module.graph)
    call_region(graph_module, [run_of(nodes[:3]), run_of(nodes[3:])])
    graph_module.graph.lint()
    graph_module.recompile()
    assert count_regions(graph_module) == {"region_0": 2}
    inputs = torch.randn(2, 3), torch.randn(3, 3), torch.randn(3, 3)
    assert torch.equal(graph_module(*inputs), blocks(*inputs))


def test_a_view_that_leaves_a_run_is_made_again_outside() -> None:
    graph_module = make_fx(lambda x: x.sin().T, tracing_mode="fake")(torch.randn(2, 3))
    run = run_of(calls(graph_module.graph))
    assert [n.name for n in run.passed()] == ["permute"] and run.given() == [0]
    call_region(graph_module, [run])
    graph_module.recompile()
    assert [n.name for n in calls(graph_module.graph)][-1].startswith("permute")
    x = torch.randn(2, 3)
    assert torch.equal(graph_module(x), x.sin().T)


def test_random_calls_belong_to_no_region() -> None:
    graph = make_fx(lambda x: torch.rand_like(x) + x, tracing_mode="fake")(torch.randn(2)).graph
    assert {node.name: may_be_in_a_region(node) for node in calls(graph)} == {"rand_like": False, "add": True}
