"""lower_to_aten: a captured graph in ATen operators, with the lines of the forward kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fusion_compile.passes import format_graph, lower_to_aten
from fusion_compile.passes._user_frame import user_line


def captured(fn: Any, *inputs: Tensor) -> fx.GraphModule:
    """The Dynamo graph of `fn`."""
    graphs: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


def test_functions_become_aten_operators_and_inputs_keep_their_names() -> None:
    graph_module = captured(lambda x: torch.nn.functional.silu(x).sum(), torch.randn(2, 3))
    before = format_graph(graph_module.graph)
    lowered = lower_to_aten(graph_module)
    assert_expected_inline(
        format_graph(lowered.graph),
        """\
l_x_: float32[2, 3] = input
silu: float32[2, 3] = aten.silu.default(l_x_)
sum_1: float32[] = aten.sum.default(silu)
return [sum_1]""",
    )
    assert format_graph(graph_module.graph) == before
    x = torch.randn(2, 3)
    assert torch.equal(lowered(x)[0], torch.nn.functional.silu(x).sum())


def test_a_node_keeps_the_line_it_came_from() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.sin()

    lowered = lower_to_aten(captured(fn, torch.randn(3)))
    (sin,) = lowered.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert user_line(sin) == f"{__file__}:{fn.__code__.co_firstlineno + 1}"


def test_the_backward_is_written_out_with_the_modules_of_the_forward() -> None:
    layer = nn.Linear(3, 2)

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        loss = torch.nn.functional.linear(x, weight).square().sum()
        return torch.autograd.grad(loss, [weight])[0]

    weight = layer.weight.detach().requires_grad_()
    x = torch.randn(4, 3)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        graph_module = captured(fn, x, weight)
    lowered = lower_to_aten(graph_module)
    backward = [n for n in lowered.graph.nodes if n.meta.get("autograd_backward")]
    assert backward and {user_line(n) for n in backward} <= {
        f"{__file__}:{fn.__code__.co_firstlineno + line}" for line in (1, 2)
    }
    given = {"l_x_": x, "l_weight_": weight}
    got = lowered(*(given[n.name] for n in lowered.graph.find_nodes(op="placeholder")))[0]
    torch.testing.assert_close(got, 2 * (x @ weight.T).T @ x)


def test_tensors_that_the_graph_holds_are_read_as_attributes() -> None:
    """As the parameters of an optimizer that runs inside the program."""

    held = nn.Module()
    held.inner = nn.Module()
    weights = held.inner.weight = nn.Parameter(torch.randn(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = FakeTensorMode().from_tensor(torch.ones(2))
    weight = graph.get_attr("inner.weight")
    graph.output((graph.call_method("add_", (weight, x)),))
    lowered = lower_to_aten(fx.GraphModule(held, graph), gradients=False)
    assert format_graph(lowered.graph).splitlines()[:3] == [
        "inner_weight: float32[2] = inner_weight",
        "x: float32[2] = input",
        "add_: float32[2] = aten.add_.Tensor(inner_weight, x)",
    ]
    before = weights.detach().clone()
    with torch.no_grad():
        lowered(torch.ones(2))
    assert torch.equal(weights, before + 1)


def checkpointed(x: Tensor, weight: Tensor) -> Tensor:
    for _ in range(2):
        x = checkpoint(lambda y: torch.mm(y, weight).sin(), x, use_reentrant=False)
    return torch.autograd.grad(x.sum(), [weight])[0]


def test_a_checkpointed_call_is_computed_again_in_the_backward_and_marked() -> None:
    x, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        graph_module = captured(checkpointed, x, weight)
    lowered = lower_to_aten(graph_module)
    again = [n for n in lowered.graph.nodes if (n.meta.get("custom") or {}).get("recomputed")]
    computed = [(str(n.target), n.meta["custom"]["recomputed"]) for n in again if "detach" not in str(n.target)]
    # The last region is needed first. Its sine is not needed, but the product whose cosine its gradient is.
    assert computed == [("aten.mm.default", 2), ("aten.mm.default", 1)]
    assert all(n.meta["autograd_backward"] for n in again)
    line = checkpointed.__code__.co_firstlineno + 2
    assert {user_line(n) for n in again} == {f"{__file__}:{line}"}
    assert sum(n.target is torch.ops.aten.mm.default for n in lowered.graph.nodes if n not in again) == 2 + 3
    given = {"l_x_": x, "l_weight_": weight}
    got = lowered(*(given[n.name] for n in lowered.graph.find_nodes(op="placeholder")))[0]
    torch.testing.assert_close(got, checkpointed(x, weight), rtol=0, atol=0)  # float64 in the same order


def test_a_graph_without_examples_is_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(ValueError, match="x has no meta\\['example_value'\\]"):
        lower_to_aten(fx.GraphModule(nn.Module(), graph))
