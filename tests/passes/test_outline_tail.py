"""outline_tail: what a graph ends with becomes one region, its writes into inputs included, and gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import count_launches, format_graph, outline_tail

aten = torch.ops.aten


def trace(fn: Callable[..., object], *inputs: Any) -> fx.GraphModule:
    return make_fx(fn, tracing_mode="fake")(*inputs)


def tensors(n: int) -> list[Tensor]:
    return [torch.arange(4.0) + i for i in range(n)]


def assert_outlines(fn: Callable[..., Any], n: int, *, left: int, **options: Any) -> fx.GraphModule:
    """`fn` of `n` tensors ends in a region, `left` kernels stay outside, inputs and results are bit for bit the same,
    and a second run changes nothing."""
    graph_module = trace(fn, *tensors(n))
    report = outline_tail(graph_module, **options)
    assert report.changed == 1 and report.exact and count_launches(graph_module) == 1 + left
    got, want = tensors(n), tensors(n)
    results = list(graph_module(*got) or []), list(fn(*want) or [])
    for a, b in zip([*got, *results[0]], [*want, *results[1]], strict=True):
        assert torch.equal(a, b)
    text = format_graph(graph_module.graph)
    assert outline_tail(graph_module, **options).changed == 0 and format_graph(graph_module.graph) == text
    return graph_module


def test_applied() -> None:
    def step(w: Tensor, g: Tensor) -> None:
        new = w - g.sin() * 0.5
        w.copy_(new)

    graph_module = assert_outlines(step, 2, left=0)
    region = graph_module.get_submodule("region_0")
    assert isinstance(region, fx.GraphModule)
    assert_expected_inline(
        format_graph(region.graph),
        """\
input_0: float32[4] = input
input_1: float32[4] = input
sin: float32[4] = aten.sin.default(input_0)
mul: float32[4] = aten.mul.Tensor(sin, 0.5)
sub: float32[4] = aten.sub.Tensor(input_1, mul)
copy_: float32[4] = aten.copy_.default(input_1, sub)
return []""",
    )


def test_absent_where_nothing_is_written_at_the_end() -> None:
    graph_module = trace(lambda x: [x.sin() + x.cos()], *tensors(1))
    before = format_graph(graph_module.graph)
    assert outline_tail(graph_module).changed == 0 and format_graph(graph_module.graph) == before


def test_it_begins_behind_what_it_may_not_hold() -> None:
    def step(w: Tensor, g: Tensor) -> list[Tensor]:
        joined = torch.cat([g.sin(), g.cos()])
        w.copy_(w + joined[:4])
        return [joined.sum()]

    def no_cat(node: fx.Node) -> bool:
        return node.target is not aten.cat.default

    assert_outlines(step, 2, left=3, may_hold=no_cat)


def test_what_it_writes_is_one_memory_inside() -> None:
    """The view is made before the region, which writes what it is a view of."""

    def step(w: Tensor, g: Tensor) -> list[Tensor]:
        half = w[:2]
        noise = torch.rand_like(g) * 0
        new = w + g + noise
        w.copy_(new)
        return [half * 2, new.sin()]

    graph_module = trace(step, *tensors(2))
    outline_tail(graph_module)
    region = graph_module.get_submodule("region_0")
    assert isinstance(region, fx.GraphModule)
    assert len(region.graph.find_nodes(op="placeholder")) == 3  # w, g, the random numbers; not the half
    got, want = tensors(2), tensors(2)
    for a, b in zip([*graph_module(*got), *got], [*step(*want), *want], strict=True):
        assert torch.equal(a, b)


def test_a_write_in_the_middle_ends_it() -> None:
    """``add_`` is no final write: nothing before it is taken in."""

    def step(w: Tensor, v: Tensor) -> None:
        new = w.sin()
        v.add_(new)
        w.copy_(new.cos() + v.exp())

    assert_outlines(step, 2, left=2)


def test_what_reads_more_than_tensors_stays_outside() -> None:
    def step(w: Tensor, v: Tensor) -> None:
        values, _ = torch.max(v.view(2, 2), 0)
        w.copy_(w.sin() + values.repeat(2))

    graph_module = trace(step, *tensors(2))
    for node in graph_module.graph.find_nodes(op="placeholder")[1:]:
        node.meta["val"] = None
    assert outline_tail(graph_module).changed == 1 and count_launches(graph_module) == 1
