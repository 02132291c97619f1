"""A training step as an optimizer: the same run, its numbers in ``param_groups``, its state without the model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fusion_compile import compile_training_step, optim
from fusion_compile.integrations._step_optimizer import StepOptimizer
from tests.small_models import batches, mlp
from tests.torch_loops import close_to_torch, equal, loss_of, train, weights


def begun(recipe: Any = "adamw") -> tuple[nn.Module, StepOptimizer]:
    model = mlp()
    step = compile_training_step(model, lambda m, x, y: loss_of(m, (x, y)), optimizer=recipe, mode="eager")
    return model, StepOptimizer(step)


def run(optimizer: StepOptimizer, data: Any, each: Any = lambda: None) -> list[torch.Tensor]:
    losses = []
    for batch in data:
        losses.append(optimizer.step(closure=functools.partial(optimizer.training_step, *batch)))
        each()
    return losses


def test_a_scheduler_of_torch_sets_the_steps_rate() -> None:
    model, optimizer = begun(optim.adamw(lr=1e-2))
    reference = mlp()
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    run(optimizer, batches(5), LambdaLR(optimizer, lambda i: 1 / (1 + i)).step)
    train(reference, theirs, batches(5), LambdaLR(theirs, lambda i: 1 / (1 + i)).step)
    close_to_torch(model, reference)
    assert optimizer.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_a_schedule_of_the_step_runs_until_somebody_writes_the_number() -> None:
    _, optimizer = begun(optim.adamw(lr=optim.linear(1e-2, total_steps=10)))
    run(optimizer, batches(2))
    assert callable(optimizer.training_step.hyperparameters["lr"])
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, batches(1))
    assert dict(optimizer.training_step.hyperparameters)["lr"] == pytest.approx(0.5, rel=0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"'lr' is -1\.0"):
        run(optimizer, batches(1))


@pytest.mark.parametrize("recipe", ["adamw", "sf_adamw"])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(recipe: str) -> None:
    model, optimizer = begun(recipe)
    run(optimizer, batches(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert "model" not in saved[1]["training_step"]
    run(optimizer, batches(6)[3:])
    again, other = begun(recipe)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    run(other, batches(6)[3:])
    assert equal(weights(again), weights(model))


def test_what_it_cannot_do_is_said() -> None:
    _, optimizer = begun()
    with pytest.raises(TypeError, match=r"taken in the closure: optimizer\.step\(closure="):
        optimizer.step()
    with pytest.raises(ValueError, match="it lacks 'training_step'"):
        optimizer.load_state_dict(torch.optim.AdamW(mlp().parameters()).state_dict())
