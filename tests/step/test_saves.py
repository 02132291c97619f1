"""A step saves and loads its whole state, and refuses when it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.small_models import batches, bits, compiled, mlp


def test_a_folder_brings_back_weights_moments_and_counts(tmp_path: Path) -> None:
    step, (first, second) = compiled(mlp(), mode="eager"), batches(2)
    step(*first)
    step.save(tmp_path)
    went_on = step(*second)
    again = compiled(mlp(), mode="eager")
    again.load(tmp_path)
    assert again.steps_called == 1 and torch.equal(again(*second), went_on)
    assert bits(again) == bits(step)
    warm = compiled(mlp(), mode="eager", optimizer="lion").warm_start(tmp_path)
    assert warm.carried
    step.release()
    with pytest.raises(RuntimeError, match="was released"):
        step.save(tmp_path)
