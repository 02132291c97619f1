"""A graph as one Python function: the same results, and values dropped where they are used last."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._program.straight_line import straight_line
from fusion_compile.passes import outline_runs

X = torch.arange(6.0).reshape(2, 3)


def traced(fn: Any, *inputs: Tensor) -> fx.GraphModule:
    return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def test_lists_slices_keywords_and_constants_are_as_in_the_graph() -> None:
    held = torch.ones(3)

    def fn(x: Tensor) -> list[Tensor]:
        parts = torch.split(x, [1, 2], dim=1)
        joined = torch.cat([parts[1], parts[0]], 1)
        return [joined.clone(memory_format=torch.contiguous_format), x.sum(0, keepdim=True, dtype=torch.float64) + held]

    got = straight_line(traced(fn, X), {})(X)
    for a, b in zip(got, fn(X), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_a_region_frees_what_it_uses_last() -> None:
    graph = traced(lambda x: (x.sin().cos() @ x.T).exp() + 1, X)
    kept: list[Any] = []
    outline_runs(graph)
    before = straight_line(graph, {"region_0": lambda given: [given[0] * 2]})
    assert torch.equal(before(X), X * 2)

    def fn(x: Tensor) -> Tensor:
        big = x.sin()
        noise = torch.rand_like(x)  # two regions
        return (big + noise).exp().log()

    graph = traced(fn, X)
    outline_runs(graph)

    def region(given: list[Any]) -> list[Tensor]:
        kept.extend(weakref.ref(tensor) for tensor in given)
        first = given[0] + 1
        given.clear()
        assert [ref() is None for ref in kept] == [True, True]
        return [first]

    straight_line(graph, {"region_0": region})(X)
    assert len(kept) == 2
