"""A transform's periodic work: programs of their own over the same state, chosen by the CPU's count of steps.

A branch inside the step would make the CPU read a number, or would need a second CUDA graph of the whole step. A basis
that is refreshed every tenth step needs neither.
"""

from __future__ import annotations

from collections.abc import Hashable

from fusion_compile._program.lower import without_cuda_graph
from fusion_compile._program.programs import Programs
from fusion_compile._state import keys
from fusion_compile._step.turn import compiling
from fusion_compile._step.update import UpdatePlan, donated, pure_periodic
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Periodic


def work_key(index: int, work: Periodic, owner: Hashable = "") -> Hashable:
    """The key of the program of a transform's periodic work. `owner` tells apart those of several transforms."""
    return owner, index, work.name


class FirstTaken:
    """Finds the first step that was taken: at a step that was skipped there is nothing yet to begin with.

    It waits for the device until it has found one, so in an ordinary run once.
    """

    def __init__(self, plan: UpdatePlan) -> None:
        self._found = not any(work.first is not None for work in plan.transform.periodic)

    def __call__(self, state: Tensors) -> bool:
        """Whether the last step was taken, and was the first one."""
        if self._found:
            return False
        taken = int(state[keys.counts("step")])
        self._found = taken > 0
        return taken == 1 and bool(state[keys.TAKEN])


def run_due_work(
    plan: UpdatePlan, steps: int, state: Tensors, programs: Programs, *, mode: str, owner: Hashable = "", first: bool
) -> None:
    """Run the periodic work that is due after `steps` steps, in the transform's order, and write it into `state`.

    `first`: whether the last step was the first that was taken. The work is compiled without a CUDA graph and kept in
    `programs` under its `work_key`.
    """
    for i, work in enumerate(plan.transform.periodic):
        key = work_key(i, work, owner)
        if first and work.first is not None:
            donated(pure_periodic(plan, work.first))(state)
        elif work.is_due(steps) and not programs.rerun(key, state):
            compiling()
            refresh, what = donated(pure_periodic(plan, work.update)), f"{work.name} (every {work.every} steps)"
            programs.compile(key, refresh, state, mode=without_cuda_graph(mode), what=what)
