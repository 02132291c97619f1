"""The broken programs inside a training step: each is explained with its costs, or refused with the line."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.passes._compat import tree_leaves
from tests.explain.test_explain_broken import NAMES

QUICK = {"boolean_mask", "cache_attribute", "counter", "numpy_table", "recurrent"}
TAKES_THE_GRADIENT_ITSELF = {"checkpoint_ignored", "dropout_in_checkpoint", "loss_with_its_graph", "users_optimizer"}
"""Their backward is inside; in a step it is another one."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.exhaustive) for n in NAMES])
@pytest.mark.filterwarnings("ignore")  # of torch and of the programs, about what they are broken by
def test_a_broken_program_in_a_step_is_explained_or_refused_in_a_sentence(name: str) -> None:
    example = importlib.import_module(f"tests.explain.broken.{name}").broken()

    def loss(model: nn.Module, *batch: Any) -> Tensor:
        results = [t for t in tree_leaves(example.fn(*batch)) if isinstance(t, Tensor)]
        (like, *_) = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
        own: Tensor = model(like.new_ones(3, 2).float()).square().mean()
        return own + sum(t.detach().float().sum() for t in results)

    step = fc.compile_training_step(nn.Linear(2, 2), loss, optimizer="adamw", mode="default", backend="aot_eager")
    try:
        told = fc.explain(step, tuple(each.detach() if isinstance(each, Tensor) else each for each in example.args))
    except (ValueError, RuntimeError) as refused:
        said = str(refused)
        assert "AssertionError" not in said and "internal" not in said.lower()
        assert name in TAKES_THE_GRADIENT_ITSELF or ".py:" in said or "return" in said
        return
    (graph,) = told.graphs
    assert not any("no costs" in note for note in told.notes)
    assert {"forward", "backward", "optimizer", "state"} <= {r.name for r in graph.regions}
    assert graph.memory.peak_bytes and graph.memory.fused_peak_bytes
    assert fc.Explanation.from_json(told.to_json()) == told
    ours = [f for f in told.findings if "/fusion_compile/" in f.where and "/tests/" not in f.where]
    assert ours == []  # a finding must name a line that its reader can change
