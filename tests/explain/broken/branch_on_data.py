"""A Python branch that depends on a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "if "}


def broken() -> Example:
    def clipped(grad: Tensor) -> Tensor:
        norm = grad.norm()
        if norm > 1:
            grad = grad / norm
        return grad * 2

    return Example(clipped, (torch.randn(8) * 10,))


def repaired() -> Example:
    def clipped(grad: Tensor) -> Tensor:
        norm = grad.norm()
        grad = torch.where(norm > 1, grad / norm, grad)
        return grad * 2

    return Example(clipped, (torch.randn(8) * 10,))
