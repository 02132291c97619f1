"""Passes run in order, and a graph is recompiled at the end."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import Declined, PassReport, run_passes
from fusion_compile.passes._graph import calls

aten = torch.ops.aten


def relu_once(graph_module: fx.GraphModule) -> PassReport:
    """Relu(Relu(x)) -> Relu(x)."""
    graph, changed = graph_module.graph, 0
    before = len(calls(graph))
    for node in graph.find_nodes(op="call_function", target=aten.relu.default):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is aten.relu.default:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            changed += 1
    return PassReport("relu_once", True, changed, before, len(calls(graph)))


def decline(graph_module: fx.GraphModule) -> PassReport:
    return PassReport("decline", True, 0, 1, 1, declined=(Declined("relu", "it is needed."),))


def test_passes_run_in_order_on_what_the_one_before_left() -> None:
    graph_module = make_fx(lambda x: x.relu().relu().relu(), tracing_mode="fake")(torch.randn(3))
    first, second, third = run_passes(graph_module, [relu_once, decline, relu_once])
    assert (first.changed, first.nodes_before, first.nodes_after) == (2, 3, 1)
    assert second.declined[0].reason == "it is needed."
    assert third.changed == 0
    assert graph_module(torch.tensor([-1.0, 2.0, 3.0])).tolist() == [0, 2, 3]  # recompiled
