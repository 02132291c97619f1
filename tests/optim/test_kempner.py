"""KempnerForge's classes: the source's trajectories by its own arguments, its grouping, and what it gets wrong."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile.optim import kempner
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import Bowl, loss_fn, noise, start_of, trace
from tests.data.families import FamilyCase
from tests.small_models import batches, mlp, squared_error

EAGER: dict[str, Any] = {"mode": "eager"}


def of_case(name: str, model: Bowl) -> TorchOptimizer:
    given, named = list(model.parameters()), dict(model.named_parameters())
    if name == "kempner_muon":
        return kempner.Muon(
            [{"params": [named[n] for n in ("tall", "wide", "square")]}],
            [{"params": [named[n] for n in ("table", "bias", "gain")], "weight_decay": 0.0}],
            lr=0.02,
            **EAGER,
        )
    if name == "kempner_lion_wd":
        return kempner.Lion(given, weight_decay=0.1, **EAGER)
    return kempner.ScheduleFreeAdamW(given, lr=0.025, **EAGER)


@pytest.mark.parametrize("name", ["kempner_lion_wd", "kempner_sf_adamw", "kempner_muon"])
def test_it_follows_the_source(name: str) -> None:
    """The README's bound. The recorded Muon gave its table to AdamW."""
    case, model = FamilyCase(name), Bowl()
    start, optimizer = start_of(model), of_case(name, model)
    for update in range(1, 21):
        optimizer.zero_grad()
        loss_fn(model, *noise(update - 1)).backward()
        optimizer.step()
        if update in (1, 2, 5, 20):
            for kind in case.kinds:
                optimizer.train(kind == "y")
                seen = trace({n: p.detach().clone() for n, p in model.named_parameters()}, start)
                optimizer.train()
                far = {n: r for n, r in case.ratios(update, kind, seen).items() if not r <= 1}
                assert not far, (update, kind, far)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, 16)
        self.hidden = nn.Linear(16, 32)
        self.bias_of_rows = nn.Parameter(torch.zeros(2, 2))
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.hidden(self.embed(x)).tanh()) + self.bias_of_rows.sum()
        return out


@dataclasses.dataclass
class Config:
    name: str = "muon"
    lr: float = 0.02
    muon_adam_lr: float | None = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)


def test_build_optimizer_splits_by_decay_aspect_and_name() -> None:
    model = Net()
    optimizer = kempner.build_optimizer(model, Config())
    named = {id(p): n for n, p in model.named_parameters()}
    found = [({named[id(p)] for p in g["params"]}, g) for g in optimizer.param_groups]
    assert [names for names, _ in found] == [
        {"hidden.weight", "head.weight"},
        {"bias_of_rows"},
        {"embed.weight"},
        {"hidden.bias", "head.bias"},
    ]
    decays = [g["weight_decay"] if i < 2 else g["scalar_weight_decay"] for i, (_, g) in enumerate(found)]
    assert decays == [0.1, 0.0, 0.1, 0.0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    roles = {r.name: r.role for r in optimizer.routes}
    assert roles["hidden.weight"] == roles["head.weight"] == "spectral" and roles["embed.weight"] == "scalar"
    moved = float((model.hidden.bias - before["hidden.bias"]).detach().abs().max())
    assert moved == pytest.approx(3e-4, rel=1e-3), "the rest has a rate of its own"
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters()), "the source forgets those of its AdamW"


@pytest.mark.parametrize("name", kempner.NAMES)
def test_every_name_trains_and_is_pickled(name: str) -> None:
    model = mlp()
    optimizer = kempner.build_optimizer(model, {"name": name, "lr": 1e-2, "schedule_free_warmup_steps": 2})
    optimizer._inside.programs.mode = "eager"
    losses = []
    for x, y in batches(4) * 4:
        optimizer.zero_grad()
        loss = squared_error(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    optimizer.eval()
    _, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert type(other) is type(optimizer)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sgd' is not an optimizer; use one of adamw, lion, muon, schedule_free"):
        kempner.build_optimizer(mlp(), {"name": "sgd"})
    with pytest.raises(ValueError, match=r"the field 'moun_momentum' is not known; there are name, lr"):
        kempner.build_optimizer(mlp(), {"moun_momentum": 0.9})
    with pytest.raises(TypeError, match=r"Lion has no keyword 'momentun'"):
        kempner.Lion(mlp().parameters(), momentun=1)
    with pytest.raises(ValueError, match="ns_steps=9"):
        kempner.Muon([], list(mlp().parameters()), ns_steps=9)
