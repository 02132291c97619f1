"""KempnerForge's Muon and Schedule-Free AdamW: their trajectories, the aspect rule, and a rate that follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._state.routing import Route
from fusion_compile.optim import Transform
from tests.data.bowl import Bowl, loss_fn, noise, start_of, trace
from tests.data.families import FamilyCase
from tests.optim.walks import Walk

CASES = {
    "kempner_muon": lambda: optim.kempner_muon(0.02, weight_decay=0.0, matmul_dtype=torch.float32),
    "kempner_sf_adamw": lambda: optim.kempner_sf_adamw(0.025),
}


@pytest.mark.parametrize("name", CASES)
def test_it_follows_the_source(name: str) -> None:
    case, model = FamilyCase(name), Bowl()
    start = start_of(model)
    step = fc.compile_training_step(model, loss_fn, optimizer=CASES[name](), mode="eager")
    for update in range(1, 21):
        step(*noise(update - 1))
        if update in (1, 2, 5, 20):
            for kind in case.kinds:
                point = step.gradient_point() if kind == "y" else dict(model.named_parameters())
                seen = trace({n: p.detach() for n, p in point.items()}, start)
                far = {n: r for n, r in case.ratios(update, kind, seen).items() if not r <= 1}
                assert not far, (update, kind, far)


def test_long_matrices_are_among_the_rest_in_both_doors() -> None:
    model = nn.ModuleDict({"square": nn.Linear(256, 128), "long": nn.Linear(2000, 128), "head": nn.Linear(128, 200)})
    expected = {"square.weight": "spectral", "long.weight": "scalar"}

    def roles(routes: tuple[Route, ...]) -> dict[str, str]:
        return {r.name: r.role for r in routes if r.name in expected}

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, nn.ModuleDict)
        return model["long"](x).square().mean() + model["square"](x[:, :256]).square().mean()

    for make in (lambda: optim.kempner_muon(), lambda: optim.muon(max_aspect=10.0)):
        step = fc.compile_training_step(model, loss, optimizer=make(), mode="eager")
        assert roles(step.routes) == expected
        step.release()
        optimizer = optim.as_torch_optimizer(model, make, mode="eager")
        loss(model, torch.randn(2, 2000)).backward()
        optimizer.step()
        assert roles(optimizer.routes) == expected
    step = fc.compile_training_step(model, loss, optimizer="muon", mode="eager")
    assert roles(step.routes) == dict.fromkeys(expected, "spectral")
    with pytest.raises(ValueError, match="the aspect of a square"):
        optim.kempner_muon(max_aspect=0.5)


def test_the_rest_follows_the_rate() -> None:
    def moved(transform: Transform, lr: float) -> torch.Tensor:
        walk = Walk(transform, {"spectral/a": torch.zeros(1, 4, 4), "scalar/b": torch.zeros(3)})
        return walk({"spectral/a": torch.eye(4)[None], "scalar/b": torch.ones(3)}, lr=lr)["scalar/b"]

    whole = optim.kempner_muon(0.02, adam_ratio=0.1)
    torch.testing.assert_close(moved(whole, 0.02), torch.full((3,), -0.002))
    torch.testing.assert_close(moved(whole, 0.01), torch.full((3,), -0.001))
    assert "scalar_lr" not in whole.hyperparameters
