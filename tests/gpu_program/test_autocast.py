"""What a GPU's autocast computes in fp32 is computed in fp32; its products and all else stay as they were captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusion_compile._gpu_program.moved import in_aten


def captured(fn: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, given: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


def dtypes(aten: fx.GraphModule, name: str) -> set[torch.dtype]:
    """Of what the operators of this name compute."""
    return {node.meta["val"].dtype for node in aten.graph.nodes if name in str(node.target)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.layer_norm(self.first(x), (8,))
        out: Tensor = self.second(F.silu(self.first(hidden))).softmax(-1)
        return out


def test_normalizations_and_softmax_are_fp32_and_products_are_not() -> None:
    model, x = Block(), torch.ones(4, 8)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (2 / model(x)).sum()

    aten = in_aten(captured(loss, x))
    assert dtypes(aten, "addmm") == dtypes(aten, "silu") == {torch.bfloat16}
    assert dtypes(aten, "softmax") == dtypes(aten, "reciprocal") == {torch.float32}
    (norm,) = (node for node in aten.graph.nodes if "layer_norm" in str(node.target))
    assert norm.all_input_nodes[0].meta["val"].dtype == torch.float32


def test_where_autocast_is_on_around_the_graph_it_counts_too() -> None:
    model, x = Block(), torch.ones(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        aten = in_aten(captured(model, x))
    assert dtypes(aten, "softmax") == {torch.float32}


@pytest.mark.parametrize("enabled", [None, False])
def test_outside_of_autocast_nothing_is_cast(enabled: bool | None) -> None:
    def loss(x: Tensor) -> Tensor:
        if enabled is None:
            return x.softmax(-1).sum()
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=enabled):
            return x.softmax(-1).sum()

    aten = in_aten(captured(loss, torch.ones(4, 8, dtype=torch.bfloat16)))
    assert dtypes(aten, "softmax") == dtypes(aten, "sum") == {torch.bfloat16}
