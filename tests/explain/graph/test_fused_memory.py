"""The estimated peak of a fused graph beside the measured one."""

from __future__ import annotations

import pytest
from dit import DiT

import fusion_compile as fc
from tests.dit_problem import batch, loss_fn, small_dit
from tests.explain.small_step import measured_peak


@pytest.mark.parametrize("problem", ["two blocks", pytest.param("digits", marks=pytest.mark.exhaustive)])
def test_the_fused_peak_is_near_what_inductor_needs(problem: str) -> None:
    """With few images the optimizer has the peak, and run operator by operator it would need half as much again."""
    model, data = small_dit(), batch(1)
    if problem == "digits":
        model, data = DiT(hidden_size=64, depth=2, class_dropout_prob=0.1), batch(1, 32)
    step = fc.compile_training_step(model, loss_fn, optimizer="adamw", mode="default")
    step(*data)
    measured = measured_peak(step, data)
    (graph,) = step.explain().graphs
    assert graph.memory.fused_peak_bytes == pytest.approx(measured, rel=0.1)
    if problem == "two blocks":
        assert graph.memory.peak_bytes > 1.3 * measured
