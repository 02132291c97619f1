"""A number with a division or a root is computed apart on a CPU, where something larger uses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._program.numbers_once import numbers_once


def graph_of(device: str) -> fx.GraphModule:
    def update(weights: Tensor, rate: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        corrected = rate / (1 - power).sqrt()
        return weights - corrected * weights + power * rate, corrected * rate

    made: fx.GraphModule = make_fx(update, tracing_mode="fake")(
        torch.ones(8, device=device), *(torch.tensor(0.5, device=device) for _ in range(2))
    )
    return made


def apart(graph: fx.GraphModule) -> list[str]:
    return [n.name for n in graph.graph.nodes if n.meta.get("inductor_realize_to_strides")]


def test_a_dear_number_that_something_larger_uses_is_apart() -> None:
    graph = graph_of("cpu")
    assert numbers_once(graph.graph) == 1
    assert apart(graph) == ["div"], "neither the root inside of it, nor a product, nor what only a number uses"


@pytest.mark.parametrize("shape", [(), (1,)])
def test_numbers_alone_and_vectors_are_left(shape: tuple[int, ...]) -> None:
    graph = make_fx(lambda a, b: (a / b, a.sqrt()), tracing_mode="fake")(torch.ones(shape), torch.ones(shape))
    assert numbers_once(graph.graph) == 0 and apart(graph) == []


def test_a_gpus_numbers_are_left() -> None:
    assert numbers_once(graph_of("meta").graph) == 0
