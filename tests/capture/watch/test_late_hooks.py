"""Hooks that are registered after a step was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.watch.late_hooks import LateHooks
from tests.small_models import batches, compiled, mlp, squared_error


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_a_hook_on_any_module_is_named_and_its_removal_is_none() -> None:
    model, teacher = mlp(), nn.Linear(2, 2)
    hooks = LateHooks({"model": model, "loss_fn": lambda x: teacher(x)})
    hooks.check()
    handle = teacher.register_forward_hook(doubled)
    with pytest.raises(RuntimeError, match=r"a forward hook on loss_fn<teacher> was registered"):
        hooks.check()
    handle.remove()
    hooks.check()
    next(model.parameters()).register_hook(lambda grad: grad).remove()
    hooks.check()


def test_a_hook_on_all_modules_is_named() -> None:
    hooks = LateHooks({"model": mlp()})
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: None)
    try:
        with pytest.raises(RuntimeError, match="a forward pre-hook of all modules was registered"):
            hooks.check()
    finally:
        handle.remove()
    hooks.check()


def test_a_step_that_was_read_refuses_a_later_hook_until_it_is_captured_again() -> None:
    model, other = mlp(), mlp()
    step = compiled(model, lr=0.1)
    first, second = batches(2)
    step(*first)
    before = step.state_dict()["model"]
    handle = model[1].register_forward_hook(doubled)
    with pytest.raises(RuntimeError, match=r"a forward hook on model.1 was registered after the step was captured"):
        step(*second)
    assert all(torch.equal(t, before[n]) for n, t in step.state_dict()["model"].items())
    step.recapture()
    other.load_state_dict(before)
    other[1].register_forward_hook(doubled)
    # The same operators, uncompiled.
    assert float(step(*second)) == pytest.approx(float(squared_error(other, *second).detach()), rel=1e-6)
    handle.remove()
