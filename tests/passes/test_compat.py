"""The private torch API that passes need does what they rely on."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes._compat import empty_unless_held, has_unknown_size, number_of_gradient


def test_sizes_known_at_run_time_only_are_told_from_plain_ones() -> None:
    graph = make_fx(lambda x: (x.nonzero(), x.sin()), tracing_mode="fake")(torch.ones(3)).graph
    values = {node.name: node.meta["val"] for node in graph.nodes if node.op == "call_function"}
    assert has_unknown_size(values["nonzero"]) and not has_unknown_size(values["sin"])


def test_tensors_that_fill_their_storage_are_emptied_together() -> None:
    whole = torch.arange(4.0)
    parts = [nn.Parameter(whole[:2]), nn.Parameter(whole[2:])]
    del whole
    assert empty_unless_held(parts)
    assert [p.numel() for p in parts] == [0, 0]


def test_nothing_changes_where_something_else_holds_the_storage() -> None:
    whole = torch.arange(4.0)
    parts = [nn.Parameter(whole[:2]), nn.Parameter(whole[2:])]
    assert not empty_unless_held(parts)
    assert [p.tolist() for p in parts] == [[0, 1], [2, 3]]
    assert parts[1].data_ptr() == whole[2:].data_ptr()


def test_later_nodes_of_autograd_have_larger_numbers() -> None:
    x = torch.ones(2, requires_grad=True)
    first = x.sin()
    second = first.cos()
    assert number_of_gradient(first.grad_fn) < number_of_gradient(second.grad_fn)
