"""Verbs on graphs, and the printer."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import format_graph, format_node
from fusion_compile.passes._graph import (
    bytes_of,
    calls,
    dense_order,
    impurity,
    is_assertion,
    is_static,
    is_view,
    op_name,
    tensor_of,
)


def trace(fn: object, *inputs: Tensor) -> dict[str, fx.Node]:
    return {node.name: node for node in make_fx(fn, tracing_mode="fake")(*inputs).graph.nodes}  # type: ignore[arg-type]


def test_views_are_told_from_copies_and_writes() -> None:
    nodes = trace(lambda x: x.T.split(2)[0].sin().contiguous().add_(1), torch.randn(3, 4))
    assert {name for name, node in nodes.items() if is_view(node)} == {"permute", "split", "getitem", "getitem_1"}
    assert impurity(nodes["add_"]) == "add_ writes its input in place"
    assert impurity(nodes["sin"]) is None


def test_dropout_in_training_draws_numbers_and_attention_without_dropout_does_not() -> None:
    nodes = trace(lambda x: torch.bernoulli(x), torch.rand(3))
    assert impurity(nodes["bernoulli"]) == "bernoulli draws random numbers"
    q = torch.randn(1, 1, 2, 4)
    attention = trace(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert not [name for name, node in attention.items() if impurity(node)]


def test_values_bytes_and_names() -> None:
    nodes = trace(lambda x: x.chunk(2), torch.randn(4, 6, dtype=torch.float64))
    split = nodes["split"]
    assert op_name(split.target) == "split" and tensor_of(split) is None
    assert bytes_of(split) == 4 * 6 * 8 and bytes_of(nodes["getitem"]) == 2 * 6 * 8
    assert [node.name for node in calls(split.graph)] == ["split", "getitem", "getitem_1"]


def test_an_assertion_that_nothing_reads_is_one() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    check = graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (x,))
    assert is_assertion(check) and not is_assertion(x)


def test_the_order_of_a_dense_layout_and_none_of_one_with_gaps() -> None:
    dense = torch.randn(2, 3, 4)
    assert dense_order(dense) == (0, 1, 2) and dense_order(dense.permute(2, 0, 1)) == (1, 2, 0)
    assert dense_order(dense[:, :, :2]) is None
    assert is_static(dense)


def test_a_graph_is_printed_one_line_a_node_without_unread_inputs() -> None:
    graph = make_fx(lambda x, unread: x.sum(0) * 0.5, tracing_mode="fake")(torch.randn(2, 3), torch.randn(1)).graph
    assert format_graph(graph) == (
        "x_1: float32[2, 3] = input\n"
        "sum_1: float32[3] = aten.sum.dim_IntList(x_1, [0])\n"
        "mul: float32[3] = aten.mul.Tensor(sum_1, 0.5)\n"
        "return mul"
    )
    assert format_node(next(iter(graph.nodes))) == "x_1: float32[2, 3] = input"
