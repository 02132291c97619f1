"""Equal regions are compiled once, as long as somebody has them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._program import shared_regions
from fusion_compile._program.lower import lower_graph
from fusion_compile._program.shared_regions import SharedRegions


def region(fn: Callable[[Tensor], Tensor], n: int = 3) -> fx.GraphModule:
    return make_fx(lambda x: (fn(x),), tracing_mode="fake")(torch.ones(n, 2))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    seen: list[fx.GraphModule] = []

    def lower(graph: fx.GraphModule, *given: object, **options: object) -> object:
        seen.append(graph)
        return lower_graph(graph, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_regions, "lower_graph", lower)
    return seen


def test_equal_regions_are_one(lowered: list[fx.GraphModule]) -> None:
    shared = SharedRegions("default", "eager")
    first = shared.compiled(region(lambda x: x.sin() * 2))
    assert shared.compiled(region(lambda y: y.sin() * 2)) is first and len(lowered) == 1
    assert torch.equal(first([torch.ones(3, 2)])[0], torch.ones(3, 2).sin() * 2)


def test_another_constant_wiring_or_shape_is_another_region(lowered: list[fx.GraphModule]) -> None:
    shared = SharedRegions("default", "eager")
    others = [
        region(lambda x: x.sin() * 2),
        region(lambda x: x.sin() * 3),
        region(lambda x: x.sin() * x),
        region(lambda x: x.cos() * 2),
        region(lambda x: x.sin() * 2, n=4),
    ]
    kept = [shared.compiled(one) for one in others]
    assert len({id(one) for one in kept}) == len(lowered) == len(shared) == 5


def test_a_region_that_nobody_has_any_more_is_gone() -> None:
    shared = SharedRegions("default", "eager")
    one = region(lambda x: x.sin() * 2)
    made = shared.compiled(one)
    assert one in shared
    del made
    gc.collect()
    assert one not in shared and len(shared) == 0
