"""A step's programs: one for each kind of batch, kept when they ran, forgotten when they failed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step.step_programs import MAX_PROGRAMS
from tests.small_models import batches, compiled, mlp


def test_a_program_for_each_shape_up_to_the_limit() -> None:
    step = compiled(mlp(), mode="eager")
    for size in range(1, MAX_PROGRAMS + 1):
        step(*batches(1, size)[0])
    with pytest.raises(ValueError, match="this would be batch shape number 9: each shape is a program of its own"):
        step(*batches(1, 20)[0])
    step(*batches(1, 3)[0])
    assert step.steps_called == MAX_PROGRAMS + 1


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
        value = F.mse_loss(model(x), y)
        return value, {"small": value} if len(x) < 8 else {}

    step = compiled(mlp(), loss)
    step(*batches(1)[0])
    with pytest.raises(ValueError, match=r"with this batch shape the loss returns the metrics .*small"):
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
