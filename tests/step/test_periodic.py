"""Work that happens now and then: a second program over the same state, chosen by the host's count of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusion_compile import TrainingStep, compile_training_step, explain, optim
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Extras, Transform
from fusion_compile.optim._transform import Periodic
from tests.data.bowl import Bowl, loss_fn, noise


class Tally(NamedTuple):
    """`basis`: changed now and then; `steps`: ones and, on due steps, hundreds."""

    basis: Tensors
    steps: Tensor


def tally(every: int = 3, period: int = 5) -> Transform:
    """Counts what happened to it: ×10 by the first work, ×2 by each later one."""

    def init(params: Tensors) -> Tally:
        return Tally({k: torch.ones_like(p) for k, p in params.items()}, torch.zeros(()))

    def update(updates: Tensors, state: Tally, params: Tensors, context: Context) -> tuple[Tensors, Tally]:
        return updates, state._replace(steps=state.steps + (100 if context.due else 1))

    def times(factor: float) -> Any:
        return lambda state, params, context: state._replace(basis={k: factor * b for k, b in state.basis.items()})

    work = Periodic("doubling", every, times(2.0), times(10.0))
    extras = Extras("tally", diagnostics=lambda s: {"comp/steps": s.steps}, periodic=(work,), period=period)
    return Transform(init, update, extras)


MODES = [{"mode": "eager"}, {"backend": "aot_eager"}]


def walk(step: TrainingStep, first: int, last: int) -> list[tuple[float, float]]:
    told = []
    for i in range(first, last):
        step(*noise(i))
        basis = next(t for k, t in step._state.items() if "/basis/" in k)
        told.append((float(step.metrics["comp/steps"]), float(basis.flatten()[0])))
    return told


@pytest.mark.parametrize("mode", MODES, ids=["eager", "aot_eager"])
@pytest.mark.parametrize("wrapped", ["chain", "partition", "schedule_free", "groups"])
@pytest.mark.covering("eager", "schedule_free-aot_eager")
def test_first_every_and_due_follow_the_count_of_steps_through_every_wrapper(
    wrapped: str, mode: dict[str, Any]
) -> None:
    def inside() -> Transform:
        return optim.chain(tally(), optim.scale_by_learning_rate(1e-3))

    transform = {
        "chain": inside,
        "partition": lambda: optim.partition({"scalar": inside(), "spectral": optim.muon()}),
        "schedule_free": lambda: optim.schedule_free(inside(), 1e-3),
        "groups": inside,
    }[wrapped]()
    groups = [{"params": ["gain"], "name": "apart"}] if wrapped == "groups" else []
    step = compile_training_step(Bowl(), loss_fn, optimizer=transform, groups=groups, **mode)
    # first after step 1, again after 4 and 7; due are steps 1 and 6
    expected = [(100, 10), (101, 10), (102, 10), (103, 20), (104, 20), (204, 20), (205, 40), (206, 40), (207, 40)]
    assert walk(step, 0, 9) == expected
    assert {float(t.flatten()[0]) for k, t in step._state.items() if "/basis/" in k} == {40.0}  # of each group
    if "backend" in mode:
        assert len(step.programs) == 2  # the two kinds of step
        report = str(explain(step))
        assert "Now and then, without a CUDA graph: doubling" in report


def test_a_resumed_run_goes_on_with_the_count(tmp_path: Path) -> None:
    transform = optim.chain(tally(), optim.scale_by_learning_rate(1e-3))
    step = compile_training_step(Bowl(), loss_fn, optimizer=transform, mode="eager")
    walk(step, 0, 4)
    step.save(tmp_path / "ck")
    resumed = compile_training_step(Bowl(), loss_fn, optimizer=transform, backend="aot_eager")
    resumed.load(tmp_path / "ck")
    assert walk(resumed, 4, 9) == walk(step, 4, 9)
    for a, b in zip(step.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_work_that_changes_nothing_else_writes_nothing_else() -> None:
    """Only the tensors that the work replaced are inputs and outputs of its program."""
    step = compile_training_step(Bowl(), loss_fn, optimizer=optim.chain(tally(2), optim.adamw()), backend="aot_eager")
    walk(step, 0, 3)
    (program,) = step.periodic_programs.values()
    inputs = [n.name for n in program.graph.graph.nodes if n.op == "placeholder"]
    # The others: the hyperparameters, and whether the step was taken.
    assert len(inputs) == 3 and sum("basis" in name for name in inputs) == 1
    assert program.graph.code.count("copy_(") == 1


def test_no_recompile_over_many_periods() -> None:
    step = compile_training_step(
        Bowl(), loss_fn, optimizer=optim.chain(tally(2, 3), optim.adamw()), backend="aot_eager"
    )
    walk(step, 0, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        walk(step, 4, 12)
    assert len(step.programs) == 2


def test_two_parts_with_different_periods_are_refused() -> None:
    with pytest.raises(ValueError, match="single out every 3 and every 5 steps; give them one period"):
        optim.chain(tally(period=3), tally(period=5))
