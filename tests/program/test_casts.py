"""A weight that is used several times is cast once in a program, and its gradients are added in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile._program.casts import merge_casts
from fusion_compile._program.program import region_of

BF16 = torch.bfloat16


class Looped(nn.Module):
    """One block twice, the second time perhaps recomputed."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.inner, self.checkpointed = nn.Linear(8, 8, bias=False), checkpointed

    def block(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x).tanh()
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def stepped(checkpointed: bool, accumulate: int, **options: Any) -> fc.TrainingStep:
    torch.manual_seed(0)
    step = fc.compile_training_step(
        Looped(checkpointed),
        loss_fn,
        optimizer="adamw",
        compute_dtype=BF16,
        accumulate=accumulate,
        **{"backend": "aot_eager", **options},
    )
    step(torch.randn(4, 8))
    return step


def casts_of_weights(graph: fx.Graph) -> int:
    """Casts to bf16 of what has the shape of the model's one weight and is none of its gradients."""
    found = 0
    for node in graph.nodes:
        given = [*node.args, *node.kwargs.values()] if node.op == "call_function" else []
        if BF16 in given and ("_to_copy" in str(node.target) or "convert_element_type" in str(node.target)):
            found += node.args[0].meta["val"].shape == (8, 8) and region_of(node.args[0]) not in ("forward", "backward")
    return found


@pytest.mark.parametrize(
    ("checkpointed", "accumulate", "before", "after"),
    [(False, 1, 2, 1), (False, 2, 4, 1), (True, 1, 3, 2), (True, 2, 6, 4)],
)
def test_each_weight_is_cast_once_and_in_what_is_recomputed_once_more(
    checkpointed: bool, accumulate: int, before: int, after: int
) -> None:
    graph = copy.deepcopy(stepped(checkpointed, accumulate, capture="run").programs[0].graph.graph)
    assert casts_of_weights(graph) == before
    assert merge_casts(graph) == before - after
    graph.lint()
    assert casts_of_weights(graph) == after
    assert merge_casts(graph) == 0


def test_other_dtypes_and_what_the_forward_computes_are_left_alone() -> None:
    def f(w: Tensor) -> tuple[Tensor, ...]:
        return w.to(BF16), w.to(torch.float16), w.to(BF16), w.double().to(BF16)

    graph = fx.experimental.proxy_tensor.make_fx(f)(torch.ones(2)).graph
    copies = [n for n in graph.nodes if n.op == "call_function"]
    copies[0].meta["custom"] = {"region": "forward"}
    assert merge_casts(graph) == 1
    for node in graph.nodes:
        node.meta["custom"] = {"region": "forward"}
    assert merge_casts(graph) == 0


@pytest.mark.parametrize("capture", ["read", pytest.param("run", marks=pytest.mark.exhaustive)])
def test_inductor_compiles_one_cast_and_the_numbers_are_the_uncompiled_ones(capture: Any) -> None:
    counts: list[int] = []

    def look(graph: fx.Graph) -> None:
        counts.append(casts_of_weights(graph))

    with config.patch(post_grad_custom_post_pass=look, fx_graph_cache=False):
        compiled = stepped(False, 2, backend="inductor", mode="default", capture=capture)
    uncompiled = stepped(False, 2, mode="eager")
    assert counts == [1]
    # One step of AdamW moves each weight by the lr of 1e-3, whatever its gradient's last bits.
    torch.testing.assert_close(
        list(compiled.model.parameters()), list(uncompiled.model.parameters()), rtol=0, atol=2e-6
    )
