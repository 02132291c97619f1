"""A number of the module that every call changes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "python_scalar", "line_contains": "calls += 1"}

calls = 0


def broken() -> Example:
    def warmed_up(x: Tensor) -> Tensor:
        global calls
        calls += 1
        return x * min(1.0, calls / 100)

    x = torch.randn(8)
    return Example(warmed_up, (x,), ((x,), (x,)))


def repaired() -> Example:
    def warmed_up(x: Tensor, calls: Tensor) -> Tensor:
        return x * (calls / 100).clamp(max=1)

    x = torch.randn(8)
    return Example(warmed_up, (x, torch.tensor(1)), ((x, torch.tensor(2)), (x, torch.tensor(3))))
