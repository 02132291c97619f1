"""State that is written in place and not marked to keep its address."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "unmarked_mutation", "line_contains": "mul_("}


def broken() -> Example:
    def average(mean: Tensor, x: Tensor) -> Tensor:
        mean.mul_(0.9).add_(x, alpha=0.1)
        return mean.sum()

    return Example(average, (torch.zeros(8), torch.randn(8)))


def repaired() -> Example:
    def average(mean: Tensor, x: Tensor) -> Tensor:
        mean.mul_(0.9).add_(x, alpha=0.1)
        return mean.sum()

    mean = torch.zeros(8)
    torch._dynamo.mark_static_address(mean, guard=False)
    return Example(average, (mean, torch.randn(8)))
