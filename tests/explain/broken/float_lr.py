"""A learning rate that is a Python float and decays."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "python_scalar", "line_contains": "p - lr"}


def broken() -> Example:
    def update(p: Tensor, grad: Tensor, lr: float) -> Tensor:
        return p - lr * grad

    p, grad = torch.randn(8), torch.randn(8)
    return Example(update, (p, grad, 0.1), ((p, grad, 0.09), (p, grad, 0.08)))


def repaired() -> Example:
    def update(p: Tensor, grad: Tensor, lr: Tensor) -> Tensor:
        return p - lr * grad

    p, grad = torch.randn(8), torch.randn(8)
    rates = [torch.tensor(lr) for lr in (0.1, 0.09, 0.08)]
    return Example(update, (p, grad, rates[0]), ((p, grad, rates[1]), (p, grad, rates[2])))
