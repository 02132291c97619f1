"""When a step may be called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fusion_compile._step.lifetime import Lifetime


def test_a_step_wants_the_mode_that_its_model_had() -> None:
    model = nn.Linear(2, 2)
    lifetime = Lifetime(model)
    lifetime._check_mode(model)
    with pytest.raises(RuntimeError, match=r"the model is in eval mode, .*call model\.train\(\)"):
        lifetime._check_mode(model.eval())
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"inside torch\.inference_mode\(\)"),
    ):
        lifetime._check_mode(model.train())


def test_a_released_step_refuses() -> None:
    lifetime = Lifetime(nn.Linear(2, 2))
    lifetime._check_alive()
    lifetime._released = True
    with pytest.raises(RuntimeError, match=r"this training step was released"):
        lifetime._check_alive()


def test_a_step_is_neither_copied_nor_pickled() -> None:
    lifetime = Lifetime(nn.Linear(2, 2))
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled\. Save its state"):
            attempt(lifetime)
