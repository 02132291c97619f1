"""Caches that a module holds in a list, one for each layer, and adds to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "unmarked_mutation", "line_contains": "add_(", "op": "sums[1]"}


class InList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sums = [torch.zeros(4), torch.zeros(4)]

    def forward(self, x: Tensor) -> Tensor:
        self.sums[1].add_(x)
        return self.sums[0] + self.sums[1]


class InBuffers(nn.Module):
    first: Tensor
    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(4))
        self.register_buffer("second", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.second.add_(x)
        return self.first + self.second


def broken() -> Example:
    return Example(InList(), (torch.randn(4),), ((torch.randn(4),),))


def repaired() -> Example:
    return Example(InBuffers(), (torch.randn(4),), ((torch.randn(4),),))
