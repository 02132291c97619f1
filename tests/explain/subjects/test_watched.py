"""A training step that is watched while it runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc


def image_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def test_a_watched_training_step_is_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    step = fc.compile_training_step(model, image_loss, optimizer="adamw", backend="aot_eager")
    before = [p.detach().clone() for p in model.parameters()]
    explanation = fc.explain(step, (torch.randn(3, 4), torch.tensor([0, 1, 1])))
    assert explanation.runtime is not None and explanation.findings == ()
    assert step.steps_called == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model.weight.data = model.weight.data.clone()
    (finding,) = fc.explain(step).findings
    assert (finding.kind, finding.op) == ("rebound_parameter", "weight")
