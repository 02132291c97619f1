"""A running mean that a module replaces at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "unmarked_mutation", "line_contains": "self.mean = ", "op": "mean"}


class Replaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x - self.mean


class Written(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(self.mean * 0.9 + x.detach().mean(0) * 0.1)
        return x - self.mean


def broken() -> Example:
    return Example(Replaced(), (torch.randn(3, 4),), ((torch.randn(3, 4),),))


def repaired() -> Example:
    return Example(Written(), (torch.randn(3, 4),), ((torch.randn(3, 4),),))
