"""outline_runs: what lies between regions becomes regions too, and the graph gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import count_launches, count_regions, fold_repeated_regions, format_graph, outline_runs

X, W = torch.randn(3, 4), torch.randn(4, 4)


def trace(fn: Callable[..., object], *inputs: Any) -> fx.GraphModule:
    graph_module = make_fx(fn, tracing_mode="fake")(*inputs)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def assert_outlines(fn: Callable[..., Any], *inputs: Tensor, regions: list[int], left: int) -> fx.GraphModule:
    """`fn` outlines to regions that are called so often, `left` kernels stay outside, it gives the same bits, and a
    second run changes nothing."""
    graph_module = trace(fn, *inputs)
    report = outline_runs(graph_module)
    counts = count_regions(graph_module)
    assert sorted(counts.values()) == regions and report.changed == sum(regions)
    assert report.exact and not report.bytes_added
    assert count_launches(graph_module) - sum(regions) == left
    got, want = graph_module(*inputs), fn(*inputs)
    for a, b in zip(*((v if isinstance(v, (tuple, list)) else (v,)) for v in (got, want)), strict=True):
        assert torch.equal(a, b)
    text = format_graph(graph_module.graph)
    assert outline_runs(graph_module).changed == 0
    assert format_graph(graph_module.graph) == text
    return graph_module


def test_applied() -> None:
    graph_module = assert_outlines(lambda x, w: (x @ w).sin().T, X, W, regions=[1], left=0)
    assert_expected_inline(
        format_graph(graph_module.graph),
        """\
x_1: float32[3, 4] = input
w_1: float32[4, 4] = input
region_0: ? = region_0
invoke_subgraph: (float32[3, 4]) = invoke_subgraph(region_0, region_0, x_1, w_1)
getitem: float32[3, 4] = getitem(invoke_subgraph, 0)
permute_1: float32[4, 3] = aten.permute.default(getitem, [1, 0])
return permute_1""",
    )


def test_absent_for_one_kernel_and_for_views() -> None:
    assert_outlines(lambda x, w: (x @ w).T[1:], X, W, regions=[], left=1)


def test_runs_between_regions_that_are_equal_share_one() -> None:
    def block(x: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x @ w) * 0.5
        return x + torch.sigmoid(h.exp() + h.cos()).sin()

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        x = x.abs().sqrt()
        for i, w in enumerate(weights):
            x = block(x, w)
            if i % 3 != 2:
                x = x.neg().exp2()
        return x.relu().log1p()

    weights = tuple(torch.randn(4, 4) for _ in range(6))
    graph_module = trace(fn, X, *weights)
    want = graph_module(X, *weights)
    fold_repeated_regions(graph_module)
    assert count_regions(graph_module) == {"region_0": 6}
    outline_runs(graph_module)
    assert sorted(count_regions(graph_module).values()) == [1, 1, 4, 6] and count_launches(graph_module) == 12
    assert torch.equal(graph_module(X, *weights), want)


def test_several_users_and_several_outputs() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a = (x @ w).sin()
        values, order = a.sort(dim=1)
        left, right = values.split(2, dim=1)
        return a, order, left, right, right.cos() + left

    assert_outlines(fn, X, W, regions=[1], left=0)


def test_chance_and_effects_stay_outside_and_part_the_runs() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        x = (x @ w).sin()
        x = x + 0 * torch.rand_like(x)
        return x.cos().exp()

    graph_module = assert_outlines(fn, X, W, regions=[1, 1], left=1)
    assert "rand_like" in format_graph(graph_module.graph)


def test_sizes_known_at_run_time_only_stay_outside() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        picked = (x @ w).sin().flatten().nonzero()
        return picked.float().sum() * x.sum()

    graph_module = make_fx(fn, tracing_mode="symbolic")(X, W)
    outline_runs(graph_module)
    assert torch.equal(graph_module(X, W), fn(X, W))
    assert "nonzero" in format_graph(graph_module.graph)


def test_a_kernel_that_reads_very_many_tensors_stays_outside() -> None:
    """Compiled, the concatenation of a row is a loop for each of its pieces."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).sin()
        return torch.cat([y.cos() + i for i in range(40)])

    assert_outlines(fn, X, W, regions=[1], left=1)


def test_a_call_that_reads_more_than_tensors_is_left() -> None:
    graph_module = trace(lambda x, w: (x @ w).sin().cos(), X, W)
    list(graph_module.graph.find_nodes(op="placeholder"))[1].meta["val"] = None
    assert outline_runs(graph_module).changed == 1 and count_launches(graph_module) == 2
