"""The numbers of the last step by name, as copies."""

from __future__ import annotations

from fusion_compile._step.metrics import step_metrics
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
