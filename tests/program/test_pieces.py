"""compile_pieces: as many pieces compiled at any depth, weights read where the graph module has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._program.pieces import compile_pieces
from fusion_compile._sampler.table.conditioning_table import bind_weights

WIDTH = 4
X = torch.randn(3, WIDTH)


def block(x: Tensor, w: Tensor) -> Tensor:
    """Nine kernels."""
    h = torch.tanh(x @ w) * 0.5
    return x + torch.sigmoid(h.exp() + h.cos()).sin()


def network(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    x = x.abs().sqrt()
    for w in weights:
        x = block(x, w)
    return (x.relu().log1p(),)


def bound(weights: list[Tensor]) -> fx.GraphModule:
    graph_module = make_fx(network, tracing_mode="fake")(X, *weights)
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    bind_weights(graph_module, dict(zip(names[1:], weights, strict=True)))
    return graph_module


@pytest.mark.parametrize("depth", [4, 8])
def test_inductor_compiles_three_pieces_at_any_depth(depth: int) -> None:
    weights = [torch.randn(WIDTH, WIDTH) for _ in range(depth)]
    torch.compiler.reset()
    with torch.no_grad():
        pieces, repeated = compile_pieces(bound(list(weights)), mode="default", backend="inductor")
        got, codes = run_and_get_code(pieces, X)
    assert repeated == {"region_0": depth} and len(codes) == 3
    torch.testing.assert_close(got[0], network(X, *weights)[0])  # fused kernels round in another order


def test_the_graph_module_is_as_it_was_and_its_weights_are_read() -> None:
    weights: list[Tensor] = [nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(4)]
    graph_module = bound(weights)
    before = graph_module.code
    with torch.no_grad():
        pieces, _ = compile_pieces(graph_module, mode="default", backend="eager")
        assert graph_module.code == before
        assert torch.equal(pieces(X)[0], network(X, *weights)[0])
        weights[1].mul_(2)
        assert torch.equal(pieces(X)[0], network(X, *weights)[0])
        name = next(n for n, p in graph_module.named_parameters() if p is weights[2])
        graph_module._parameters[name] = weights[2] = nn.Parameter(torch.randn(WIDTH, WIDTH))
        assert torch.equal(pieces(X)[0], network(X, *weights)[0])


def test_a_frozen_block_among_trained_ones_runs() -> None:
    """torch.compile tells tensors that require gradients from others; both kinds reach the same piece."""
    weights: list[Tensor] = [nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=i % 2 == 0) for i in range(4)]
    with torch.no_grad():
        pieces, repeated = compile_pieces(bound(weights), mode="default", backend="eager")
        assert repeated == {"region_0": 4}
        assert torch.equal(pieces(X)[0], network(X, *weights)[0])
