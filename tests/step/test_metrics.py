"""The numbers of the last step by name, as copies."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._state import keys
from fusion_compile._step.metrics import keep_metrics, step_metrics
from tests.small_models import batches, compiled, mlp


def test_numbers_metrics_and_counts_stand_together_and_are_copies() -> None:
    step = compiled(mlp(), mode="eager", lr=0.5)
    step(*batches(1)[0])
    found = step_metrics(step._plan.update, step._state)
    assert set(found) == {
        *step.hyperparameters,
        "loss",
        "grad_norm",
        "update_norm",
        "step",
        "skipped",
    }
    assert (float(found["lr"]), int(found["step"]), int(found["skipped"])) == (0.5, 1, 0)
    step.hyperparameters["lr"] = 0.25
    step(*batches(1)[0])
    assert (float(found["lr"]), int(found["step"])) == (0.5, 1)


def test_a_metric_gets_its_room_and_may_not_have_a_name_of_the_steps_own() -> None:
    step = compiled(mlp(), mode="eager")
    update, state = step._plan.update, dict(step._state)
    keep_metrics(update, state, {"accuracy": ((3,), torch.int64)})
    room = state[keys.metrics("accuracy")]
    assert (room.shape, room.dtype, int(room.sum())) == ((3,), torch.int64, 0)
    before = set(state)
    with pytest.raises(ValueError, match="the metric name 'lr' is taken by the step itself"):
        keep_metrics(update, state, {"fine": ((), torch.float32), "lr": ((), torch.float32)})
    assert set(state) == before
