"""What is dropped gives its memory back: programs, steps, torch optimizers, samplers and explanations."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from tests.house.source import ROOT

TIMES = 2


class Timed(nn.Module):
    """A model that is conditioned on time."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.into = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8)), nn.Linear(3, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.into(x) * (1 + self.time(torch.cos(t[:, None] * torch.arange(4))))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def step(model: nn.Module, backend: str) -> object:
    ema = fc.EMA(model)
    made = fc.compile_training_step(model, squares, optimizer="adamw", ema=ema, backend=backend)
    made(torch.ones(2, 8))
    made.evaluate(torch.ones(2, 8))
    return made


def facade(model: nn.Module, backend: str) -> object:
    optimizer = fc.optim.as_torch_optimizer(model, "sf_adamw", backend=backend)
    squares(model, torch.ones(2, 8)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def explanation(model: nn.Module, backend: str) -> object:
    return fc.explain(model, (torch.ones(2, 8),), backend=backend)


def explained_step(model: nn.Module, backend: str) -> object:
    made = fc.compile_training_step(model, squares, optimizer="adamw", backend=backend, rehearse=False)
    made(torch.ones(2, 8))
    return fc.explain(made), made


def sampler(model: nn.Module, backend: str) -> object:
    made = fc.optimize_sampler(model.eval().requires_grad_(False), n_steps=2, backend=backend)
    for t in (1.0, 0.5):
        made(torch.ones(2, 3), torch.full((2,), t))
    return made


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """What the benchmark counts: bytes of memory in which tensors lie."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    counted: Callable[[], int] = importlib.import_module("dropped").alive
    return counted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "same", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["one model", "new models"]
)
@pytest.mark.parametrize("make", [step, facade, explanation, explained_step, sampler])
def test_many_made_and_dropped_hold_no_more_than_one(
    make: Callable[[nn.Module, str], object], same: bool, alive: Callable[[], int]
) -> None:
    def new() -> nn.Module:
        return Timed() if make is sampler else nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))

    model, held, gone = new(), [], []
    for _ in range(TIMES):
        model = model if same else new()
        made = make(model, "aot_eager")
        if not isinstance(made, tuple):
            gone.append(weakref.ref(made))
        del made
        held.append(alive())
        assert all(ref() is None for ref in gone)
    size = sum(p.numel() for p in model.parameters()) * 4
    # Less than half of a model's weights: what torch itself keeps (counters, seeds) is far below it.
    assert held[-1] - held[0] < size / 2, held
