"""Costs of nodes from their shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import count_launches, exchange_rates
from fusion_compile.passes._cost import flops

Q = torch.randn(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("fn", "inputs", "expected"),
    [
        (torch.mm, (torch.randn(3, 4), torch.randn(4, 5)), 2 * 3 * 4 * 5),
        (torch.bmm, (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (torch.addmm, (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)), 2 * 3 * 4 * 5),
        (F.conv2d, (torch.randn(1, 3, 8, 8), torch.randn(6, 3, 3, 3)), 2 * (6 * 6 * 6) * (3 * 3 * 3)),
        (torch.add, (torch.randn(3, 4), torch.randn(3, 4)), 0),
    ],
    ids=["mm", "bmm", "addmm", "conv2d", "add"],
)
def test_flops_count_multiply_adds_twice(
    fn: Callable[..., object], inputs: tuple[torch.Tensor, ...], expected: int
) -> None:
    graph = make_fx(fn, tracing_mode="fake")(*inputs).graph
    assert sum(map(flops, graph.nodes)) == expected


def test_views_and_unpackings_launch_nothing() -> None:
    graph_module = make_fx(lambda x: x.T.view(4, 3).chunk(2)[0].sin() + 1, tracing_mode="fake")(torch.randn(3, 4).T)
    assert count_launches(graph_module) == 2  # sin and add


def test_a_launch_is_dearer_on_a_gpu() -> None:
    gpu, cpu = exchange_rates(torch.device("cuda")), exchange_rates(torch.device("cpu"))
    assert (gpu.bytes_per_launch, gpu.flops_per_byte) == (2 << 20, 150)
    assert (cpu.bytes_per_launch, cpu.flops_per_byte) == (16 << 10, 8)
