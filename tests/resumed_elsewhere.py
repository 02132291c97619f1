"""Runs of every codec and every form of half precision that one process begins and another goes on with.

``python -m tests.resumed_elsewhere FOLDER`` goes on from what `begin` left in FOLDER and writes what came out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim import Transform
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.small_models import squared_error

RUNS: dict[str, tuple[Callable[[], Transform], str]] = {
    "exact": (lambda: optim.adamw(1e-2), "exact"),
    "kahan": (lambda: optim.adamw(1e-2), "kahan"),
    "stochastic": (lambda: optim.adamw(1e-2), "stochastic"),
    "int8": (lambda: optim.adamw(1e-2, momentum="int8", second_moment="int8"), "stochastic"),
    "4bit": (lambda: optim.lion(1e-3, momentum="4bit"), "exact"),
    "bf16": (lambda: optim.adamw(1e-2, momentum="bf16", second_moment="bf16"), "master"),
}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 3)).to(torch.bfloat16)


def batch(i: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(i)
    return torch.randn(4, 5, generator=source).bfloat16(), torch.randn(4, 3, generator=source).bfloat16()


def step_of(name: str, seed: int) -> fc.TrainingStep:
    make, half_precision = RUNS[name]
    return fc.compile_training_step(
        model(seed), squared_error, optimizer=make(), half_precision=half_precision, mode="eager"
    )


def loop_of(name: str, seed: int) -> tuple[nn.Module, TorchOptimizer]:
    make, half_precision = RUNS[name]
    net = model(seed)
    return net, optim.as_torch_optimizer(net, make, half_precision=half_precision, mode="eager")


def take(net: nn.Module, optimizer: TorchOptimizer, i: int) -> None:
    optimizer.zero_grad()
    squared_error(net, *batch(i)).backward()
    optimizer.step()


def flat(step: fc.TrainingStep, net: nn.Module, optimizer: TorchOptimizer) -> dict[str, Any]:
    saved = step.state_dict()
    return {
        "model": saved["model"],
        "optimizer": saved["optimizer"],
        "net": dict(net.state_dict()),
        "state": optimizer.state_dict()["state"],
    }


def begin(folder: Path) -> dict[str, dict[str, Any]]:
    """Three steps, a checkpoint, three more: what came out, by run."""
    out = {}
    for name in RUNS:
        step, (net, optimizer) = step_of(name, 1), loop_of(name, 1)
        for i in range(6):
            if i == 3:
                step.save(folder / name)
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{name}.pt")
            step(*batch(i))
            take(net, optimizer, i)
        out[name] = flat(step, net, optimizer)
    return out


def go_on(folder: Path) -> None:
    out = {}
    for name in RUNS:
        step, (net, optimizer) = step_of(name, 7), loop_of(name, 7)
        step.load(folder / name)
        saved = torch.load(folder / f"{name}.pt")
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        for i in range(3, 6):
            step(*batch(i))
            take(net, optimizer, i)
        out[name] = flat(step, net, optimizer)
    torch.save(out, folder / "out.pt")


if __name__ == "__main__":
    go_on(Path(sys.argv[1]))
