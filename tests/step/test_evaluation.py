"""An evaluation is the loss in evaluation mode, and nothing of the training notices it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import PROGRAMS, bits, compiled

BOTH = pytest.mark.parametrize("options", PROGRAMS.values(), ids=PROGRAMS)


class Denoiser(nn.Module):
    """Has what differs between the modes: batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.leave(F.dropout(self.norm(self.enter(x)), 0.5, self.training))
        return found


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


def noisy(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    noise = torch.randn_like(x)
    apart = (model(x + noise) - noise).square()
    return apart.mean(), {"by entry": apart.mean(0)}


def data(seed: int, size: int = 8) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def ordinary(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The same with torch alone, with the model's weights."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        loss, metrics = noisy(model.eval(), x)
    model.train()
    return {"loss": loss, **metrics}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # one program fuses what torch rounds in between


@BOTH
def test_it_is_the_ordinary_loss_with_the_weights_that_are_asked_for(options: dict[str, Any]) -> None:
    model = denoiser()
    ema = fc.EMA(model, 0.5)
    step = fc.compile_training_step(model, noisy, optimizer="sf_adamw", lr=0.1, ema=ema, rehearse=False, **options)
    for seed in range(2):
        step(data(seed))
    x = data(9)
    near(step.evaluate(x, seed=3), ordinary(model, x, 3))
    near(step.evaluate(x, weights=ema, seed=4), ordinary(ema.model, x, 4))
    current = denoiser()
    current.load_state_dict({**model.state_dict(), **step.gradient_point()})
    near(step.evaluate(x, weights="current", seed=5), ordinary(current, x, 5))
    assert len(step._evaluation.programs) == len(options.get("backend", "")[:1])  # one serves all three


@BOTH
def test_training_is_bitwise_the_same_with_it_and_without(options: dict[str, Any]) -> None:
    def trained(evaluates: bool) -> tuple[list[float], dict[str, bytes], list[float]]:
        step = compiled(denoiser(), noisy, **options)
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        losses = []
        for seed in range(3):
            losses.append(float(step(data(seed))))
            if evaluates:
                before = {n: t.clone() for n, t in step.metrics.items()}
                step.evaluate(data(seed + 10), seed=seed)
                torch.testing.assert_close(step.metrics, before, rtol=0, atol=0)
        assert all(module.training for module in step.model.modules())
        return losses, bits(step), [random.random(), np.random.rand(), float(torch.rand(1))]

    assert trained(True) == trained(False)


class Counts(nn.Module):
    """Keeps what it computed, in evaluation mode too: a count, a queue, a cache."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.kept = nn.Linear(4, 4), 0, []  # type: ignore[var-annotated]
        self.register_buffer("seen", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(x.mean())
        self.seen += 1
        found: Tensor = self.layer(x) * self.calls + torch.randn(4, generator=self.generator) + random.random()
        return found


def test_a_model_that_remembers_is_put_back() -> None:
    model = Counts()
    step = fc.compile_training_step(model, lambda m, x: m(x).square().mean(), mode="eager")
    step(data(0))
    before = model.calls, len(model.kept), float(model.seen), model.generator.get_state().clone()
    found = [step.evaluate(data(1))["loss"] for _ in range(4)]
    assert len({float(loss) for loss in found}) == 1
    assert (model.calls, len(model.kept), float(model.seen)) == before[:3] == (1, 1, 1.0)
    assert torch.equal(model.generator.get_state(), before[3])


def reads_on_the_host(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss * 2 if not model.training and loss.item() > 0 else loss


def test_what_cannot_be_captured_runs_as_python_and_says_so() -> None:
    step = compiled(nn.Linear(4, 4), reads_on_the_host)
    step(data(0))
    with pytest.warns(UserWarning, match=r"evaluate\(\) runs the loss as Python"):
        first = step.evaluate(data(0))["loss"]
    with torch.no_grad():
        want = 2 * step.model(data(0)).square().mean()
    assert torch.equal(first, want) and torch.equal(step.evaluate(data(0))["loss"], want)
    assert not step._evaluation.programs


def test_a_later_shape_is_captured_when_it_comes_back_and_a_hook_captures_again() -> None:
    step = compiled(denoiser(), noisy)
    programs = step._evaluation
    sizes = []
    for size in (8, 3, 3, 8):
        near(step.evaluate(data(0, size)), ordinary(step.model, data(0, size), 0))
        sizes.append(len(programs.programs))
    assert sizes == [1, 1, 2, 2]
    step.model.get_submodule("enter").register_forward_hook(lambda module, given, found: found + 1)
    near(step.evaluate(data(0)), ordinary(step.model, data(0), 0))


def test_it_may_be_asked_for_in_inference_mode_and_before_the_first_step() -> None:
    step = fc.compile_training_step(denoiser(), noisy, mode="eager")
    with torch.inference_mode():
        found = step.evaluate(data(0))
    near(found, ordinary(step.model, data(0), 0))
    step(data(0))
