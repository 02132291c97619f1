"""A table that is created in the step and on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "cpu_tensor", "line_contains": "torch.linspace("}


def broken() -> Example:
    def weighted(x: Tensor) -> Tensor:
        weights = torch.linspace(0, 1, 8)
        return (x * weights).sum(-1)

    return Example(weighted, (torch.randn(4, 8),))


def repaired() -> Example:
    def weighted(x: Tensor) -> Tensor:
        weights = torch.linspace(0, 1, 8, device=x.device)
        return (x * weights).sum(-1)

    return Example(weighted, (torch.randn(4, 8),))
