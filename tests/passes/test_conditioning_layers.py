"""Which linear layers of a conditioning vector are factored, and why others are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import BindingTime, binding_times
from fusion_compile.passes._conditioning_layers import ancestors, choose_groups, factorable_layers, rows_and_width

ROLES = {"t_1": BindingTime.STEP, "x_1": BindingTime.LIVE}


def modulated(x: Tensor, t: Tensor, early: Tensor, w: Tensor, v: Tensor) -> Tensor:
    g = F.silu(t[:, None] @ early)
    return x * (g @ w) + g @ v


def graph_of(width: int = 32) -> fx.Graph:
    inputs = (torch.randn(2, 48), torch.rand(2), torch.randn(1, width), torch.randn(width, 48), torch.randn(width, 48))
    return make_fx(modulated, tracing_mode="fake")(*inputs).graph


def test_layers_are_grouped_by_the_vector_they_read() -> None:
    graph = graph_of()
    groups, declined = factorable_layers(graph, binding_times(graph, ROLES), rank=4)
    ((root, layers),) = groups.items()
    assert root.name == "silu" and rows_and_width(root) == (2, 32)
    assert [(layer.node.name, layer.sizes) for layer in layers] == [("mm_1", (32, 48)), ("mm_2", (32, 48))]
    assert declined == {"mm": "rank 4 is not below the sizes of its weight, [32, 1]."}


def test_a_rank_that_saves_nothing_is_declined_with_the_sizes() -> None:
    graph = graph_of()
    groups, declined = factorable_layers(graph, binding_times(graph, ROLES), rank=31)
    assert not groups
    assert declined["mm_1"] == "a factor of rank 31 and an offset of 2 rows take no less than its weight of width 32."


def test_mean_and_basis_must_pay_for_themselves() -> None:
    graph = graph_of(width=8)
    groups, declined = factorable_layers(graph, binding_times(graph, ROLES), rank=5)
    only = {root: layers[:1] for root, layers in groups.items()}
    assert choose_groups(only, 5, declined) == {}
    assert declined["mm_1"] == "mean and basis of its input, shared by 1 layers, take what their factors save."


def test_ancestors_are_all_that_a_node_is_computed_from() -> None:
    graph = graph_of()
    nodes = {node.name: node for node in graph.nodes}
    assert {n.name for n in ancestors([nodes["mm"]])} == {"mm", "unsqueeze", "t_1", "early_1"}
