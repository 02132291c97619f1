"""A schedule that a module holds as a numpy array."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "cpu_tensor", "line_contains": "torch.from_numpy(", "op": "betas"}


class Schedule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.betas = np.linspace(1e-4, 0.02, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * torch.from_numpy(self.betas).to(x)[t]


class Buffered(nn.Module):
    betas: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("betas", torch.linspace(1e-4, 0.02, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.betas[t]


def broken() -> Example:
    return Example(Schedule(), (torch.randn(4), torch.arange(4)))


def repaired() -> Example:
    return Example(Buffered(), (torch.randn(4), torch.arange(4)))
