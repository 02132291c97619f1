"""A buffer that the forward assigns is a new tensor after each step, as in the ordinary loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_models import PROGRAMS, batches, compiled, squared_error, torch_loop

RECIPE: dict[str, Any] = {"lr": 1e-2}


class Averaged(nn.Module):
    """A linear layer that adds the running mean of its input, a buffer that each forward replaces."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.inner = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.inner(x + self.mean)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fp32 sums of another order


@pytest.mark.parametrize("program", [*PROGRAMS.values(), {"backend": "aot_eager", "capture": "run"}], ids=str)
def test_a_history_of_a_buffer_keeps_its_numbers(program: dict[str, Any]) -> None:
    wanted: list[Tensor] = []
    model = Averaged()
    for batch in batches(4):
        torch_loop(model, [batch], squared_error, **RECIPE)
        wanted.append(model.mean)
    model = Averaged()
    step = compiled(model, squared_error, **RECIPE, **program)
    history = []
    for batch in batches(4):
        step(*batch)
        history.append(model.mean)
    for got, want in zip(history, wanted, strict=True):
        near(got, want)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_the_user_writes_into_the_new_one_counts(program: dict[str, Any]) -> None:
    model, other = Averaged(), Averaged()
    step = compiled(model, squared_error, **program)
    first, second = batches(2)
    step(*first)
    model.mean.fill_(3.0)
    assert step.state_dict()["model"]["mean"].tolist() == [3.0] * 4
    step(*second)
    near(model.mean, 0.9 * torch.full((4,), 3.0) + 0.1 * second[0].mean(0))
    other.mean = torch.full((4,), 5.0)
    model.load_state_dict(other.state_dict())
    step(*second)
    near(model.mean, 0.9 * torch.full((4,), 5.0) + 0.1 * second[0].mean(0))


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_loaded_state_is_what_the_module_holds(program: dict[str, Any]) -> None:
    model = Averaged()
    step = compiled(model, squared_error, **program)
    first, second = batches(2)
    step(*first)
    saved, mean = step.state_dict(), model.mean.clone()
    step(*second)
    step.load_state_dict(saved)
    assert torch.equal(model.mean, mean)
    step.release()
    assert torch.equal(model.mean, mean) and model.state_dict().keys() == Averaged().state_dict().keys()
