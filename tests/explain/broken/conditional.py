"""A torch.cond, whose predicate the CPU reads."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "capture_unsafe", "line_contains": "torch.cond("}


def broken() -> Example:
    def guarded(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    return Example(guarded, (torch.randn(8),))


def repaired() -> Example:
    def guarded(x: Tensor) -> Tensor:
        return torch.where(x.sum() > 0, x.sin(), x.cos())

    return Example(guarded, (torch.randn(8),))
