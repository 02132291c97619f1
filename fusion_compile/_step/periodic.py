"""A transform's periodic work: programs of their own over the same state, chosen by the host's count of steps.

A branch inside the step would make the host read a number, or record a second CUDA graph of the whole step; a basis
that is refreshed every tenth step needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusion_compile import _compat
from fusion_compile._program.lower import lower, no_recompile, without_cuda_graph
from fusion_compile._program.program import Program
from fusion_compile._progress import stage
from fusion_compile._step.pure_step import StepPlan, donated, pure_periodic
from fusion_compile._types import Tensors


class PeriodicWork:
    """Runs what `plan.transform.periodic` asks for, after the steps at which it is due. `programs`: those captured."""

    def __init__(self, plan: StepPlan, *, mode: str, backend: str) -> None:
        self._plan, self._mode, self._backend = plan, without_cuda_graph(mode), backend
        self._compiled: dict[int, Callable[[Tensors], None]] = {}
        self.programs: dict[str, Program] = {}

    def after_step(self, steps: int, state: Tensors) -> None:
        """Do what is due when `steps` steps have been taken, in the order in which the transforms stand."""
        for i, periodic in enumerate(self._plan.transform.periodic):
            if steps == 1 and periodic.first is not None:
                donated(pure_periodic(self._plan, periodic.first))(state)
            elif periodic.is_due(steps):
                self._run(i, state)

    def _run(self, i: int, state: Tensors) -> None:
        if (compiled := self._compiled.get(i)) is not None:
            with no_recompile():
                compiled(state)
            return
        periodic = self._plan.transform.periodic[i]

        def observe(graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
            self.programs[periodic.name] = Program(graph)

        work = _compat.own_code(donated(pure_periodic(self._plan, periodic.update)))
        run = lower(work, mode=self._mode, backend=self._backend, on_graph=observe)
        with stage(f"compiling {periodic.name} (every {periodic.every} steps)"):
            run(state)
        self._compiled[i] = run
