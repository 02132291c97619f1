"""Methods of classes, which no guard of Dynamo's compares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._step.methods import Methods
from tests.small_models import batches, compiled


class Activation(nn.Module):
    slope = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.shaped(x)

    def shaped(self, x: Tensor) -> Tensor:
        return x.tanh()


@pytest.mark.parametrize("name", ["forward", "shaped"])
def test_a_step_refuses_a_method_that_was_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled(nn.Sequential(nn.Linear(4, 2), Activation()))
    step(*batches(1)[0])
    before = step.state_dict()["model"]
    monkeypatch.setattr(Activation, name, lambda self, x: x.sigmoid())
    with pytest.raises(RuntimeError, match=rf"Activation.{name} was replaced after the step was compiled"):
        step(*batches(1)[0])
    assert all(torch.equal(t, before[n]) for n, t in step.state_dict()["model"].items())
    monkeypatch.undo()
    step(*batches(1)[0])


def test_plain_values_of_a_class_are_not_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = Methods([Slot(Activation, "slope", ""), Slot(Activation, "shaped", "")], nn.Linear(1, 1))
    monkeypatch.setattr(Activation, "slope", 2.0)
    methods.check()
    monkeypatch.setattr(Activation, "shaped", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"Activation.shaped"):
        methods.check()
