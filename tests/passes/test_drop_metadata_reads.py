"""drop_metadata_reads: arguments of which only shape, dtype or device is read stop being dependencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import drop_metadata_reads, format_graph


def trace(fn: Callable[..., object], *inputs: Tensor, mode: Literal["fake", "symbolic"] = "fake") -> fx.GraphModule:
    return make_fx(fn, tracing_mode=mode)(*inputs)


def with_reads(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    shift = torch.ops.aten.type_as.default(t, x)
    return shift * 2, torch.ops.aten.zeros_like.default(x) + 1


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3), torch.randn(2, 3, dtype=torch.float64)


def export_like(fn: Callable[..., object]) -> fx.GraphModule:
    """A graph that still holds type_as, as torch.export leaves it; make_fx would decompose it."""
    tracer = fx.symbolic_trace(fn)
    t, x = inputs()
    fake = torch._subclasses.FakeTensorMode()
    values = {"t": fake.from_tensor(t), "x": fake.from_tensor(x)}
    for node in tracer.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = values[node.name]
        elif node.op == "call_function":
            with fake:
                args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args)
    return tracer


def test_applied() -> None:
    graph_module = export_like(with_reads)
    report = drop_metadata_reads(graph_module)
    assert report.changed == 2 and report.exact
    assert_expected_inline(
        format_graph(graph_module.graph),
        """\
t: float32[3] = input
_to_copy_default: float64[3] = aten._to_copy.default(t, dtype=torch.float64, device=cpu)
mul: float64[3] = mul(_to_copy_default, 2)
full_default: float64[2, 3] = aten.full.default([2, 3], 0, dtype=torch.float64, device=cpu)
add: float64[2, 3] = add(full_default, 1)
return [mul, add]""",
    )


def test_absent() -> None:
    graph_module = trace(lambda t, x: t + x, *inputs())
    before = format_graph(graph_module.graph)
    assert drop_metadata_reads(graph_module).changed == 0
    assert format_graph(graph_module.graph) == before


def test_numbers_are_equal() -> None:
    graph_module = export_like(with_reads)
    drop_metadata_reads(graph_module)
    given = inputs()
    for got, want in zip(graph_module(*given), with_reads(*given), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def test_all_users_follow_the_replacement() -> None:
    def fn(t: Tensor, x: Tensor) -> Tensor:
        like = torch.ops.aten.expand_as.default(t, x)
        return like * like + torch.ops.aten.sin.default(like)

    graph_module = export_like(fn)
    assert drop_metadata_reads(graph_module).changed == 1
    x = next(n for n in graph_module.graph.nodes if n.name == "x")
    assert not x.users


def test_declines_symbolic_sizes_with_a_reason() -> None:
    graph_module = trace(lambda x: torch.zeros_like(x) + x, torch.randn(5, 3), mode="symbolic")
    report = drop_metadata_reads(graph_module)
    assert report.changed == 0
    assert "symbolic size" in report.declined[0].reason
