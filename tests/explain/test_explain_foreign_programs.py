"""Programs that are not ours are explained, and the result agrees with what can be checked from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fusion_compile as fc
from tests.explain.run.lines import line_of


class Foreign(NamedTuple):
    """`module`: the name that a node of the graph must be traced to; `source`: a part of its file's path."""

    model: nn.Module
    args: tuple[Tensor, ...]
    module: str
    source: str
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    backend: str = "aot_eager"


def vision_transformer() -> Foreign:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return Foreign(ViTModel(config).eval(), (torch.randn(2, 3, 32, 32),), "layer", "modeling_vit.py")


def gpt2() -> Foreign:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)
    return Foreign(GPT2LMHeadModel(config).eval(), (torch.arange(32).view(2, 16),), "transformer.h", "modeling_gpt2.py")


def sd3_block() -> Foreign:
    from diffusers.models.attention import JointTransformerBlock

    block = JointTransformerBlock(32, num_attention_heads=2, attention_head_dim=16).eval()
    return Foreign(block, (torch.randn(2, 16, 32), torch.randn(2, 8, 32), torch.randn(2, 32)), "attn", "diffusers")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 8 * 8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.stem(images).relu(), 2)
        return self.head(features.flatten(1))


def cnn() -> Foreign:
    return Foreign(
        Classifier(), (torch.randn(2, 3, 16, 16),), "stem", "test_explain_foreign_programs.py", backend="inductor"
    )


@pytest.mark.parametrize("make", [vision_transformer, gpt2, sd3_block, cnn])
def test_a_foreign_program_is_explained(make: Callable[[], Foreign]) -> None:
    foreign = make()
    with torch.no_grad():
        # The counter does not know the fused attention of the CPU, but the products that it is made of.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            foreign.model(*foreign.args, **foreign.kwargs)
        told = fc.explain(foreign.model, foreign.args, foreign.kwargs, backend=foreign.backend)

    assert told.findings == ()
    (graph,) = told.graphs
    flops = sum(node.flops for node in graph.nodes)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert any(foreign.module in node.module for node in graph.nodes)
    assert any(foreign.source in node.where for node in graph.nodes if node.where)
    assert graph.memory.peak_bytes > 0 and graph.memory.curve[graph.memory.peak_node] == graph.memory.peak_bytes

    assert told.runtime is not None
    assert told.runtime.graph_breaks == () and told.runtime.recompiles == ()
    assert told.runtime.guards and told.runtime.phases
    assert bool(told.runtime.kernels) == (foreign.backend == "inductor")
    assert fc.Explanation.from_json(told.to_json()) == told


def test_an_input_of_a_library_is_told_by_the_users_name_at_the_users_line() -> None:
    """Dynamo tells ``args[0]`` at a wrapper of the library, or the user's name at a line inside the library."""
    model = gpt2().model

    def score(ids: Tensor) -> Tensor:
        return model(ids).logits.sum()  # the call

    ids = torch.arange(32).view(2, 16)
    (size,) = fc.explain(score, (ids,), calls=[(ids[:, :8],)], backend="eager").findings
    assert (size.kind, size.op, size.where) == ("dynamic_shape", "ids.shape[1]", line_of(__file__, "the call"))
    (dtype,) = fc.explain(model, (ids,), calls=[(ids.int(),)], backend="eager").findings
    assert dtype.op == "input_ids" and "from int64 to int32" in dtype.why
    assert "modeling_gpt2.py:" in dtype.where  # where the model itself is explained, no line of the user's calls it
