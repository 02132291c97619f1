"""A count of the calls that warms something up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {
    "kind": "python_scalar",
    "line_contains": "self.calls += 1",
    "op": "self.calls",
    "remedy_contains": "keep it in a buffer",
}


class WarmsUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * min(1.0, self.calls / 3)


class ByTensor(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * (self.seen / 3).clamp(max=1)


def broken() -> Example:
    return Example(WarmsUp(), (torch.randn(3),), ((torch.randn(3),),) * 3)


def repaired() -> Example:
    return Example(ByTensor(), (torch.randn(3),), ((torch.randn(3),),) * 3)
