"""FLOP as torch counts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fusion_compile as fc
from fusion_compile.explain._facts import GraphFacts
from tests.dit_problem import batch, loss_fn
from tests.explain.small_step import small_step


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.Flatten(), nn.Linear(8 * 3 * 3, 5),
    )  # fmt: skip


def image_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def backward(loss: Callable[..., Tensor], model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    loss(model, *batch).backward()


def sd3_block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(32, 2, 16), (torch.randn(2, 16, 32), torch.randn(2, 6, 32), torch.randn(2, 32))


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.MultiheadAttention(32, 4, batch_first=True), (torch.randn(2, 24, 32),) * 3


def vision_transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    return ViTModel(ViTConfig(intermediate_size=64, patch_size=8, **sizes)).eval(), (torch.randn(2, 3, 16, 16),)


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    return GPT2Model(config).eval(), (torch.randint(0, 50, (2, 12)),)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def flops(graph: GraphFacts, *regions: str) -> int:
    return sum(r.flops for r in graph.regions if r.name in regions or not regions)


@pytest.mark.parametrize("make", [sd3_block, attention, vision_transformer, gpt2])
def test_flops_of_a_forward_agree_with_torch(make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    """Attention is written out as matrix products in both: torch's counter takes the CPU's own kernel for free."""
    model, inputs = make()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        (graph,) = fc.explain(model, inputs, run=False).graphs
        assert flops(graph) == pytest.approx(counted(lambda: model(*inputs)), rel=0.01)
    assert flops(graph) > 0


@pytest.mark.exhaustive
def test_flops_of_forward_and_backward_agree_with_torch() -> None:
    """The transformer's attention is a kernel whose backward computes the scores again, hence half a percent more."""
    model, data = convolutional(), (torch.randn(2, 3, 8, 8), torch.randint(0, 5, (2,)))
    step = fc.compile_training_step(model, image_loss, optimizer="adamw", backend="aot_eager")
    step(*data)
    for explained, loss, given in ((step, image_loss, data), (small_step(), loss_fn, batch(1))):
        (graph,) = explained.explain().graphs
        with sdpa_kernel(SDPBackend.MATH):
            expected = counted(partial(backward, loss, explained.model, given))
        explained.model.zero_grad()
        assert flops(graph, "forward", "backward") == pytest.approx(expected, rel=0.01)
        assert flops(graph, "state") == 0


def test_attention_on_a_cpu_is_counted_though_torch_does_not() -> None:
    q = torch.randn(1, 2, 8, 16)
    (graph,) = fc.explain(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), run=False).graphs
    assert flops(graph) == 2 * (2 * 2 * 8 * 8 * 16)  # two products of [8, 16] and [16, 8], two heads


def test_views_cost_nothing_and_an_expanded_operand_is_read_once() -> None:
    def program(x: Tensor, row: Tensor) -> Tensor:
        return x.t().reshape(4, 8) + row.expand(4, 8)

    (graph,) = fc.explain(program, (torch.randn(8, 4), torch.randn(8)), run=False).graphs
    nodes = {n.op.split(".")[1]: n for n in graph.nodes if n.region != "input"}
    assert nodes["t"].launches == nodes["expand"].bytes_read == nodes["expand"].bytes_written == 0
    assert nodes["add"].bytes_read == 4 * 8 * 4 + 8 * 4
    assert nodes["add"].bytes_written == 4 * 8 * 4
