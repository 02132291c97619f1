"""write_into_joins: regions write their parts of a concatenation, which holds the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import count_launches, count_regions, format_graph, outline_runs, write_into_joins
from fusion_compile.passes._compat import invoke_subgraph

X = torch.arange(6.0).reshape(2, 3)
aten = torch.ops.aten


def joins(node: fx.Node) -> bool:
    return node.target in (aten.cat.default, aten.stack.default)


def assert_writes(fn: Callable[..., Any], *inputs: Tensor, parts: int, left: int) -> fx.GraphModule:
    """Regions of `fn` write so many parts, `left` kernels are outside of regions, and the bits are the same. A second
    run changes nothing."""
    graph_module = make_fx(fn, tracing_mode="fake")(*inputs)
    outline_runs(graph_module, may_hold=lambda node: not joins(node))
    graph_module.graph.eliminate_dead_code()
    report = write_into_joins(graph_module, is_join=joins)
    assert report.changed == parts and report.exact
    calls = graph_module.graph.find_nodes(op="call_function", target=invoke_subgraph)
    assert count_launches(graph_module) - len(calls) == left
    want = fn(*inputs)
    for a, b in zip(graph_module(*inputs), want, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    text = format_graph(graph_module.graph)
    assert write_into_joins(graph_module, is_join=joins).changed == 0
    assert format_graph(graph_module.graph) == text
    return graph_module


def region_of(graph_module: fx.GraphModule) -> str:
    region = graph_module.get_submodule("region_0")
    assert isinstance(region, fx.GraphModule)
    return format_graph(region.graph)


def test_applied() -> None:
    """Views on the way to the concatenation are made inside; a part that no region computes is copied."""
    graph_module = assert_writes(
        lambda x: [torch.cat([x.sin().cos().t().reshape(-1), x.reshape(-1)])], X, parts=1, left=2
    )
    assert_expected_inline(
        region_of(graph_module),
        """\
input_0: float32[2, 3] = input
part_0: float32[6] = input
sin: float32[2, 3] = aten.sin.default(input_0)
cos: float32[2, 3] = aten.cos.default(sin)
t: float32[3, 2] = aten.t.default(cos)
clone: float32[3, 2] = aten.clone.default(t, memory_format=torch.contiguous_format)
_unsafe_view: float32[6] = aten._unsafe_view.default(clone, [6])
copy__default: float32[6] = aten.copy_.default(part_0, _unsafe_view)
return []""",
    )


def test_every_call_of_a_region_writes_its_own_part() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        a = x.sin().cos()
        noise = x.bernoulli(0.0)  # between two calls of one region
        return [torch.stack([a, noise.sin().cos()])]

    graph_module = assert_writes(fn, X, parts=2, left=2)
    assert count_regions(graph_module) == {"region_0": 2}


def test_absent() -> None:
    assert_writes(lambda x: [x.sin().cos()], X, parts=0, left=0)


def test_stacks_are_written_row_by_row() -> None:
    assert_writes(lambda x: [torch.stack([x.sin().cos(), x.exp() + 1, x])], X, parts=2, left=2)


def test_casts_happen_at_the_write() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        return [torch.cat([(x.sin() + 1).to(torch.float64), x.double()])]

    assert "float64[2, 3] = aten.copy_" in region_of(assert_writes(fn, X, parts=2, left=1))


def test_a_part_that_something_else_reads_is_copied() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        a = x.sin().cos()
        return [torch.cat([a, x]), a]

    assert_writes(fn, X, parts=0, left=3)


def test_one_value_in_two_places_is_copied() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        a = x.sin().cos()
        return [torch.cat([a, a])]

    assert_writes(fn, X, parts=0, left=3)


def test_another_axis_is_left() -> None:
    assert_writes(lambda x: [torch.cat([x.sin().cos(), x], 1)], X, parts=0, left=1)
