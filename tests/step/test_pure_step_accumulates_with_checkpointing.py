"""Accumulation and activation checkpointing together, which torch can recompute in one backward region only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile._program import program


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.exhaustive
def test_a_checkpointed_step_that_accumulates_is_one_graph_and_equals_one_big_batch() -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(8, 8)
    whole = copy.deepcopy(model)
    parts = fc.compile_training_step(model, loss, optimizer="adamw", mode="default", backend="aot_eager", accumulate=2)
    big = fc.compile_training_step(whole, loss, optimizer="adamw", mode="eager")
    for _ in range(3):
        # fp32: the mean of two means is summed in another order than one mean over eight rows.
        torch.testing.assert_close(parts(x), big(x), rtol=1e-6, atol=1e-7)
    (program,) = parts.programs
    assert program.checkpoints == 4
    assert program.backwards == 1


def test_a_graph_that_cannot_be_written_out_is_a_warning_and_the_rest_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = fc.compile_training_step(Blocks(), loss, optimizer="adamw", mode="default", backend="aot_eager")
    step(torch.randn(4, 8))

    def fails(graph: object, **options: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(program, "lower_to_aten", fails)
    with pytest.warns(UserWarning, match="the backward was not searched.*no such operator"):
        assert step.programs[0].findings(thorough=True) == ()
