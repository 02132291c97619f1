"""Steps that run user code: at every call, or once, with a watch."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._capture.watch.reads import reading
from fusion_compile._step.by_running import CapturedStep
from fusion_compile._step.carried import Carried
from fusion_compile._step.counted import count_numbers
from fusion_compile._step.run_step import RunStep, UncapturedStep
from tests.small_models import batches, compiled, mlp, squared_error

CPU = torch.device("cpu")


def test_an_uncaptured_step_runs_python_at_every_call() -> None:
    calls, state = [], {"w": torch.ones(2)}

    def advance(state: dict[str, Tensor], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        calls.append(1)
        return {"w": state["w"] + batch[0], "new": batch[0]}

    step = UncapturedStep(advance, Carried(), [])
    assert [step(state, (torch.ones(2),)).keys() for _ in range(2)] == [{"new"}] * 2
    assert len(calls) == 2 and state["w"].tolist() == [3.0, 3.0] and step.fits(state, ()) and step.forms == {}


def test_a_captured_step_counts_and_watches() -> None:
    settings = types.SimpleNamespace(scale=2.0, steps=0)

    def advance(state: dict[str, Tensor], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        settings.steps += 1
        return {"w": state["w"] * settings.scale}

    state = {"w": torch.ones(2)}
    roots = {"loss_fn": advance}
    slot = Slot(vars(settings), "steps", "settings.steps")
    numbers = count_numbers(
        [slot], lambda mode: advance({"w": torch.ones(2)}, ()), lambda: setattr(settings, "steps", 0), CPU
    )
    with reading() as reads:
        advance({"w": torch.ones(2)}, ())
    captured = CapturedStep(advance, state, ())
    settings.steps = 0
    step = RunStep(captured, {}, numbers)
    step.watch(roots, reads, Carried())
    for steps in (1, 2):
        assert step.fits(state, ()) and step(state, ()) == {}
        step.done()
        assert settings.steps == steps
    assert state["w"].tolist() == [4.0, 4.0] and step.program.captured_by == "run"
    settings.scale = 3.0
    with pytest.raises(RuntimeError, match=r"settings.scale was 2.0 when the program was captured and is 3.0 now"):
        step(state, ())
    assert settings.steps == 2 and state["w"].tolist() == [4.0, 4.0]


def test_a_changed_module_is_noticed_and_nothing_happens() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 2), nn.LeakyReLU(0.5))
    step = compiled(model, squared_error, capture="run")
    step(*batches(1)[0])
    before = model[0].weight.clone()
    model[1].negative_slope = 0.1
    with pytest.raises(RuntimeError, match=r"model.1.negative_slope was 0.5 when the program was captured and is 0.1"):
        step(*batches(1)[0])
    assert torch.equal(model[0].weight, before)


def test_both_ways_take_the_same_step() -> None:
    """Bitwise: the operators are the same, in the same order."""
    one, other = mlp(), mlp()
    for model, capture in ((one, "read"), (other, "run")):
        step = compiled(model, capture=capture)
        for batch in batches(3):
            step(*batch)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
