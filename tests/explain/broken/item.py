"""A tensor's value as a Python number."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": ".item()"}


def broken() -> Example:
    def scale(x: Tensor) -> Tensor:
        largest = x.abs().max().item()
        return x / largest

    return Example(scale, (torch.randn(4, 8),))


def repaired() -> Example:
    def scale(x: Tensor) -> Tensor:
        largest = x.abs().max()
        return x / largest

    return Example(scale, (torch.randn(4, 8),))
