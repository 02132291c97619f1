"""A training step that is watched while it runs."""

from __future__ import annotations

import pytest
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


def test_what_is_called_between_two_steps_is_watched_too_and_modes_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))
    step = fc.compile_training_step(model, image_loss, optimizer="adamw", backend="aot_eager")
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 1]))

    def lower_the_rate() -> None:
        step.hyperparameters["lr"] = 1e-4

    told = fc.explain(step, batch, calls=[lower_the_rate, batch])
    assert told.runtime is not None and told.runtime.recompiles == () and told.findings == ()
    with pytest.raises(RuntimeError, match=r"train|eval"):  # the step's own refusal
        fc.explain(step, batch, calls=[model.eval, batch])
    assert model.training and model[1].training
