"""What a checkpointed region computes again waits for the gradient: in the order of nodes, and in bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile._program.program import recomputed_region, region_of
from fusion_compile._program.recomputation import recomputes, waits_for_gradient


class Block(nn.Module):
    """A normalized MLP of width 8, recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def inside(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def captured(model: nn.Module, backend: str) -> fc.TrainingStep:
    step = fc.compile_training_step(model, loss_fn, optimizer="adamw", capture="run", backend=backend)
    step(torch.randn(16, 8))
    return step


def graph_of(model: nn.Module) -> fx.Graph:
    return captured(model, "aot_eager").programs[0].graph.graph


def test_each_region_waits_for_the_gradient_that_reaches_it() -> None:
    graph = graph_of(nn.Sequential(Block(), Block()))
    assert recomputes(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    waiting = waits_for_gradient(graph)
    # The last region is recomputed first. Its normalization is the one operator that reads nothing from the region.
    assert [(str(node.target), recomputed_region(node)) for node in waiting] == [
        ("aten.native_layer_norm.default", 2),
        ("aten.native_layer_norm.default", 1),
    ]
    for node, gradient in waiting.items():
        assert region_of(gradient) == "backward" and not recomputed_region(gradient)
        assert order[gradient] < order[node]


def test_without_checkpoints_nothing_waits() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(8, 8)))
    assert not recomputes(graph)
    assert waits_for_gradient(graph) == {}


def test_inductor_keeps_recomputed_products_and_runs_them_in_the_backward() -> None:
    from torch._inductor.utils import run_and_get_code

    blocks = nn.Sequential(Block(), Block(), Block())
    step = fc.compile_training_step(blocks, loss_fn, optimizer="adamw", capture="run")
    x = torch.randn(16, 8)
    want = float(loss_fn(blocks, x).detach())
    loss, code = run_and_get_code(step, x)
    # The same products in another order of sums.
    assert float(loss) == pytest.approx(want, rel=1e-5)
    calls = [line for line in "\n".join(code).splitlines() if "extern_kernels." in line and "out=" in line]
    products = ["addmm" if "extern_kernels.addmm" in call else "mm" for call in calls]
    # Two products a block forward. In the backward each block's first product comes again, behind a gradient's product.
    assert products[:6] == ["addmm"] * 6
    assert products.count("addmm") == 9
    backward = products[6:]
    assert all(backward[i - 1] == "mm" for i, product in enumerate(backward) if product == "addmm")


def test_what_was_read_is_recomputed_in_the_backward_too() -> None:
    from torch._inductor.utils import run_and_get_code

    blocks = nn.Sequential(Block(), Block(), Block())
    step = fc.compile_training_step(blocks, loss_fn, optimizer="adamw", capture="read")
    _, code = run_and_get_code(step, torch.randn(16, 8))
    calls = [line for line in "\n".join(code).splitlines() if "extern_kernels." in line and "out=" in line]
    products = ["addmm" if "extern_kernels.addmm" in call else "mm" for call in calls]
    # Six products of the forward, and four that are computed again: the last block's two, and one of each block before
    # it. The last block's may come at once, because the backward begins with them, or behind the first weight's
    # gradient. The others stand behind products of a gradient; all of them once stood in front.
    first = products.index("mm")
    assert products.count("addmm") == 10 and first in (6, 8) and products[first:].count("addmm") == 10 - first


def test_a_mask_drawn_in_a_region_is_not_drawn_again() -> None:
    class Dropped(Block):
        def inside(self, x: Tensor) -> Tensor:
            return F.dropout(super().inside(x), 0.5)

    graph = graph_of(nn.Sequential(Dropped(), Dropped()))
    assert sum("dropout.default" in str(node.target) for node in graph.nodes) == 2
