"""Tests: a step is captured, proved and taken once; what the two ways have in common is in test_step_programs."""

from __future__ import annotations

import torch

from tests.small_models import batches, compiled, mlp


def test_both_ways_take_their_first_step_once() -> None:
    for capture in ("read", "run"):
        step = compiled(mlp(), capture=capture)
        step(*batches(1)[0])
        assert int(step.metrics["step"]) == 1 and [p.captured_by for p in step.programs] == [capture]
        assert torch.isfinite(step.metrics["loss"])
