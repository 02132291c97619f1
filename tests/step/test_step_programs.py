"""A step's programs: one for each kind of batch, kept when they ran, forgotten when they failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step.shapes import MAX_PROGRAMS
from tests.small_models import batches, compiled, mlp


@pytest.mark.exhaustive
def test_a_program_for_each_shape_up_to_the_limit() -> None:
    step = compiled(mlp(), max_shapes=3)
    for size in range(1, 4):
        step(*batches(1, size)[0])
    with pytest.raises(ValueError, match=r"batch shape number 4: each shape is a program .*max_shapes=…"):
        step(*batches(1, 20)[0])
    step(*batches(1, 3)[0])
    assert step.steps_called == 4 and len(step.programs) == 3


def test_uncompiled_any_number_of_shapes_runs() -> None:
    step = compiled(mlp(), mode="eager", max_shapes=1)
    for size in range(1, MAX_PROGRAMS + 3):
        step(*batches(1, size)[0])
    assert step.steps_called == MAX_PROGRAMS + 2


def test_a_refused_first_batch_fixes_no_kind_of_batch() -> None:
    """What the batch is made of is known from the first step that ran, not from the first that was tried."""
    step = compiled(mlp())
    with pytest.raises(ValueError, match="does not depend on"):
        compiled(mlp(), lambda model, x, y: x.sum())(*batches(1)[0])
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match="is on meta"):
        step(x.to("meta"), y)
    step(x, y)
    assert len(step.programs) == 1


def test_a_loss_that_does_something_else_at_another_shape_is_refused() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        each = (model(x) - y).square().mean(1)
        return each.mean(), {"each": each}

    step = compiled(mlp(), loss)
    step(*batches(1)[0])
    with pytest.raises(ValueError, match=r"with this batch shape the loss returns the metric 'each' as \[4\]"):
        step(*batches(1, 4)[0])
    assert len(step.programs) == 1


def test_the_warning_about_unread_parameters_is_given_once_at_the_callers_line() -> None:
    model = mlp()
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    step = compiled(model, lambda model, x, y: F.mse_loss(model(x), y), mode="eager")
    with pytest.warns(UserWarning, match="the loss never reads idle") as caught:
        step(*batches(1)[0])
        step(*batches(1, 4)[0])
    assert [w.filename for w in caught] == [__file__]


def initialising() -> tuple[Any, dict[str, bool]]:
    """A model whose first forward writes a buffer."""
    ready = {"is": False}

    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.center: Tensor
            self.register_buffer("center", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x)
            if not ready["is"]:
                self.center.copy_(out.detach().mean(0))
                ready["is"] = True
            return out - self.center

    return Centered(), ready


def test_an_initialising_step_runs_uncaptured_and_the_next_is_captured() -> None:
    model, ready = initialising()
    step = compiled(model)
    with pytest.warns(UserWarning, match=r"this step ran uncaptured, because .*ready"):
        step(*batches(1)[0])
    assert ready == {"is": True} and step.programs == [] and bool(model.center.any())
    center = model.center.clone()
    step(*batches(1)[0])
    assert len(step.programs) == 1 and torch.equal(model.center, center) and int(step.metrics["step"]) == 2


def test_a_buffer_that_changes_later_joins_the_state() -> None:
    """Programs that did not know it are compiled again."""
    model: Any = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(model(x), y)
        if len(x) < 8:
            model.late.add_(1)
        return value

    model.register_buffer("late", torch.zeros(()))
    step = compiled(model, loss)
    for size in (8, 4, 8, 4):
        step(*batches(1, size)[0])
    assert float(model.late) == 2.0 and int(model[1].num_batches_tracked) == 4
    assert float(step.state_dict()["model"]["late"]) == 2.0


@pytest.mark.exhaustive
def test_numbers_make_programs_up_to_the_limit() -> None:
    table = {"steps": 0}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        table["steps"] += 1
        return F.mse_loss(model(x), y) * torch.tensor([float(table["steps"]), 0.0])[0]

    step = compiled(mlp(), loss)
    with pytest.warns(UserWarning, match="captured by running it, because loss_fn<table>"):
        step(*batches(1)[0])
    for _ in range(MAX_PROGRAMS - 1):
        step(*batches(1)[0])
    with pytest.raises(ValueError, match="this would be program number 9 for one batch shape: a plain number"):
        step(*batches(1)[0])
