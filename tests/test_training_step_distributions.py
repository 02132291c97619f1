"""Losses from torch.distributions, which checks its arguments on the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal, kl_divergence
from torch.testing import assert_close

from tests.python_state import Training, ordinary, through_a_step
from tests.small_models import PROGRAMS, batches, compiled


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    """As torch has it before anything was compiled: torch.compile turns the checks off for good."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def normal(model: nn.Module, x: Tensor) -> Normal:
    mean, spread = model(x).chunk(2, dim=1)
    return Normal(mean, F.softplus(spread) + 1e-3)


def likelihood(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -normal(model, x).log_prob(y).mean()


def variational(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    latent = normal(model, x)
    return kl_divergence(latent, Normal(0.0, 1.0)).mean() + F.mse_loss(latent.rsample(), y)


def policy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    actions = Categorical(logits=model(x), validate_args=True)
    return -(actions.log_prob(actions.sample()) * y[:, 0]).mean() - 0.1 * actions.entropy().mean()


@pytest.mark.parametrize("way", PROGRAMS)
@pytest.mark.parametrize("loss", [likelihood, variational, policy])
def test_it_is_the_ordinary_loop(loss: Any, way: str) -> None:
    """Two runs add in another order, so float32 rounding is allowed for: assert_close's 1.3e-6 and 1e-5."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        training, seen = through_a_step(lambda: Training(model(), loss), **PROGRAMS[way])
    assert any("leaves the checks out" in str(warning.message) for warning in said) is (way == "captured")
    expected_training, expected = ordinary(lambda: Training(model(), loss))
    assert_close(seen, expected)
    assert_close(dict(training.model.state_dict()), dict(expected_training.model.state_dict()))


def test_uncaptured_the_checks_are_made() -> None:
    step = compiled(model(), lambda model, x: -Normal(model(x), 1.0).log_prob(x).mean(), mode="eager")
    step(torch.ones(8, 4))
    with pytest.raises(ValueError, match="found invalid values"):
        step(torch.full((8, 4), float("nan")))


def test_explain_says_that_they_are_left_out() -> None:
    step = compiled(model(), likelihood)
    with pytest.warns(UserWarning):
        step(*batches(1)[0])
    assert any("leaves the checks out" in note for note in step.explain().notes)


def test_reading_names_the_switch() -> None:
    step = compiled(model(), policy, capture="read")
    with pytest.raises(ValueError, match="validate_args=False"):
        step(*batches(1)[0])
