"""Programs whose GPU form is written and counted: captured on the CPU, where one step of each is really taken."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from dit import DiT
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._program.program import Program
from fusion_compile.optim import Transform


def drawn_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Rectified flow, times and noise drawn where the images lie."""
    t, e = torch.rand(len(x), device=x.device), torch.randn_like(x)
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y), e - x)


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 10


def step_programs(
    recipe: str | Transform,
    *,
    depth: int = 4,
    loss: Any = drawn_loss,
    model: nn.Module | None = None,
    steps: int = 1,
    **options: Any,
) -> tuple[fc.TrainingStep, list[Program]]:
    """The programs of a step of `recipe` on the digits DiT of `depth` blocks, captured by taking `steps` steps."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=128, depth=depth) if model is None else model
    step = fc.compile_training_step(model, loss, optimizer=recipe, backend="eager", **options)
    for _ in range(steps):
        step(*batch())
    return step, list(step.programs)
