"""The order of kernels that keeps the least memory alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.explain._graph.lifetimes import Lifetimes
from fusion_compile.explain._graph.schedule import least_memory_order


def order_of(fn: Callable[..., Any], *sizes: tuple[int, ...]) -> list[str]:
    with FakeTensorMode():
        graph = make_fx(fn)(*(torch.empty(size) for size in sizes)).graph
    nodes = [n for n in graph.nodes if n.op != "output"]
    lives = Lifetimes(nodes)
    units: list[fx.Node] = [n for n in nodes if n.op == "call_function"]
    reads = {n: [m for s in (n, *n.all_input_nodes) for m in lives.held[s]] for n in units}
    kept = lives.inputs | {m for n in graph.output_node().all_input_nodes for m in lives.held[n]}
    return [n.name for n in least_memory_order(units, reads, lives, kept)]


def test_what_frees_memory_runs_before_what_takes_more() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.expand(64, 64).sin().sum()
        return total, x.expand(64, 64).cos().sum()

    computed = [name for name in order_of(program, (64,)) if not name.startswith("expand")]
    assert computed == ["sin", "sum_1", "cos", "sum_2"]  # both tables at once would take twice the memory

    def interleaved(x: Tensor) -> tuple[Tensor, Tensor]:
        large, other = x.expand(64, 64).sin(), x.expand(64, 64).cos()
        return large.sum(), other.sum()

    assert [name for name in order_of(interleaved, (64,)) if not name.startswith("expand")] == computed


def test_reads_and_writes_in_place_keep_their_order() -> None:
    def program(state: Tensor, x: Tensor) -> Tensor:
        before = state.sum()
        state.add_(x)
        return state.mul(2).sum() + before

    order = order_of(program, (64,), (64,))
    assert order.index("sum_1") < order.index("add_") < order.index("mul")


def test_a_very_long_program_keeps_its_order() -> None:
    def program(x: Tensor) -> Tensor:
        for _ in range(2001):
            x = x.sin()
        return x

    order = order_of(program, (4,))
    assert len(order) == 2001 and order[:2] == ["sin", "sin_1"]
