"""A compiled step of a two-block transformer that several tests read, and the memory that a step really takes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import fusion_compile as fc
from benchmarks._measure import peak_of_call
from tests.dit_problem import batch, loss_fn, small_dit


@cache
def small_step() -> fc.TrainingStep:
    """The step after its first call. It is shared: read it, and leave it as it is."""
    step = fc.compile_training_step(small_dit(), loss_fn, backend="aot_eager")
    step(*batch(1))
    return step


def measured_peak(step: fc.TrainingStep, data: tuple[Tensor, ...]) -> int:
    """Bytes at the highest point of a step, its state and batch included, as the profiler saw them."""

    def kept() -> list[Tensor]:
        return [*step._state.values(), *data, *step.model.buffers()]

    return peak_of_call(lambda: step(*data), torch.device("cpu"), kept)
