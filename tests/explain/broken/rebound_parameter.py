"""New weights that are rebound instead of written in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "rebound_parameter", "line_contains": "weight.data ="}


def broken() -> Example:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            self.linear.weight.data = self.linear.weight.data * 0.99
            return y

    return Example(Averaged(), (torch.randn(4, 8),))


def repaired() -> Example:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            with torch.no_grad():
                self.linear.weight.mul_(0.99)
            return y

    return Example(Averaged(), (torch.randn(4, 8),))
