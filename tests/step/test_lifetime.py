"""When a step may be called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._state.banks import build_layout
from fusion_compile._state.residence import Residence
from fusion_compile._state.routing import route
from fusion_compile._step.lifetime import Lifetime
from tests.small_models import batches, compiled, mlp


def lifetime_of(model: nn.Module) -> Lifetime:
    return Lifetime(model, Residence(model, build_layout(model, route(model, ("scalar",)))))


def test_a_step_wants_the_mode_that_its_model_had() -> None:
    model = nn.Linear(2, 2)
    lifetime = lifetime_of(model)
    lifetime._check_mode(model)
    with pytest.raises(RuntimeError, match=r"the model is in eval mode, .*call model\.train\(\)"):
        lifetime._check_mode(model.eval())
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"inside torch\.inference_mode\(\)"),
    ):
        lifetime._check_mode(model.train())


def test_ranks_that_came_after_the_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that is made after compile_training_step() would let the ranks drift apart all the same."""
    model = mlp()
    step = compiled(model, mode="eager")
    step(*batches(1)[0])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(_compat, "ranks", lambda: 2)
    with pytest.raises(
        RuntimeError, match=r"runs with 2 ranks, and without mesh= a step does not average .*destroy_process_group"
    ):
        step(*batches(1)[0])
    assert step.steps_called == 1 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_released_step_refuses() -> None:
    lifetime = lifetime_of(nn.Linear(2, 2))
    lifetime._check_alive()
    lifetime._released = True
    with pytest.raises(RuntimeError, match=r"this training step was released"):
        lifetime._check_alive()


def test_a_step_is_neither_copied_nor_pickled() -> None:
    lifetime = lifetime_of(nn.Linear(2, 2))
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled\. Save its state"):
            attempt(lifetime)


def test_a_model_whose_parameters_were_taken_away_is_not_saved() -> None:
    """Saved, its weights would not be those that the optimizer's state belongs to."""
    model = nn.Linear(2, 2)
    lifetime = lifetime_of(model)
    lifetime._check_whole()
    model.requires_grad_(False)  # frozen parameters are what they were
    lifetime._check_whole()
    model.weight.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"weight \[2, 2\] was rebound"):
        lifetime._check_whole()
