"""Memory over a graph as the profiler measured it."""

from __future__ import annotations

import pytest
import torch
from dit import DiT
from torch import Tensor

import fusion_compile as fc
from tests.dit_problem import batch, loss_fn, small_dit
from tests.explain.small_step import measured_peak


@pytest.mark.parametrize("problem", ["digits", pytest.param("two blocks", marks=pytest.mark.exhaustive)])
def test_peak_memory_is_what_the_profiler_measured(problem: str) -> None:
    """``aot_eager`` runs the graph operator by operator, as the model of memory does. The promise is 10 %."""
    if problem == "digits":
        model, data = DiT(hidden_size=64, depth=2, class_dropout_prob=0.1), batch(1, 32)  # as the example's, narrower
        step = fc.compile_training_step(model, loss_fn, optimizer="adamw", backend="aot_eager")
    else:
        data = batch(1)
        step = fc.compile_training_step(small_dit(), loss_fn, backend="aot_eager")
    step(*data)
    measured = measured_peak(step, data)
    (graph,) = step.explain().graphs
    assert graph.memory.peak_bytes == pytest.approx(measured, rel=0.1)
    assert max(graph.memory.curve) == graph.memory.peak_bytes
    assert sum(a.bytes for a in graph.memory.alive_at_peak) == graph.memory.peak_bytes


def test_memory_counts_a_view_and_a_write_in_place_as_the_memory_that_they_look_at() -> None:
    def program(x: Tensor) -> Tensor:
        y = x * 2  # new: 64 bytes
        y.view(4, 4).add_(1)
        z = y[:8] + 1  # new: 32 bytes
        return z.sum()  # new: 4 bytes; y is gone by then

    (graph,) = fc.explain(program, (torch.randn(16),), run=False).graphs
    by_name = dict(zip((n.name for n in graph.nodes), graph.memory.curve, strict=True))
    assert by_name["x"] == 64
    assert graph.memory.peak_bytes == 64 + 64 + 32
    assert by_name[graph.nodes[-1].name] == 64 + 32 + 4
