"""The memory of each result in a graph: its size, its owner, and its last reader."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._compat import fake_mode
from fusion_compile.explain._graph.lifetimes import Lifetimes


def lifetimes(device: str = "cpu") -> tuple[dict[str, fx.Node], Lifetimes, fx.Node]:
    def program(x: Tensor) -> Tensor:
        y = x * 2
        y.view(2, 2).add_(1)
        return y + 1

    with fake_mode():
        graph = make_fx(program)(torch.empty(4, device=device)).graph
    nodes = [node for node in graph.nodes if node.op != "output"]
    return {node.name: node for node in nodes}, Lifetimes(nodes), graph.output_node()


def test_views_and_writes_in_place_have_their_inputs_memory() -> None:
    nodes, lives, _ = lifetimes()
    product = (nodes["mul"], 0)
    assert lives.held[nodes["view"]] == lives.held[nodes["add_"]] == lives.held[nodes["mul"]] == (product,)
    assert lives.made[nodes["mul"]] == [product]
    assert nodes["view"] not in lives.made and nodes["add_"] not in lives.made
    assert lives.inputs == {(nodes["x_1"], 0)}
    assert lives.sizes == {(nodes["x_1"], 0): 16, product: 16, (nodes["add"], 0): 16}


def test_memory_ends_with_its_last_reader_and_inputs_and_outputs_stay() -> None:
    nodes, lives, output = lifetimes()
    assert lives.last_use(output) == {(nodes["mul"], 0): list(nodes).index("add")}


def test_the_cuda_allocator_gives_multiples_of_512_bytes() -> None:
    _, lives, _ = lifetimes("cuda")
    assert set(lives.sizes.values()) == {512}
