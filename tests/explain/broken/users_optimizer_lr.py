"""A user's optimizer whose learning rate is a number that changes between two calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.broken.users_optimizer import Signs, with_gradients
from tests.explain.example import Example

EXPECTED = {
    "kind": "python_scalar",
    "line_contains": 'group["lr"]',
    "op": "optimizer.param_groups[0]['lr']",
    "file": "users_optimizer.py",
}


def broken() -> Example:
    optimizer = Signs(with_gradients(), 0.1)

    def update(x: Tensor) -> Tensor:
        optimizer.step()
        return x * 2

    def decay() -> None:
        optimizer.param_groups[0]["lr"] *= 0.9

    x = torch.randn(3)
    return Example(update, (x,), (decay, (x,)))


def repaired() -> Example:
    optimizer = Signs(with_gradients(), 0.1)
    rate = torch.tensor(0.1)
    optimizer.param_groups[0]["lr"] = rate

    def update(x: Tensor) -> Tensor:
        optimizer.step()
        return x * 2

    x = torch.randn(3)
    return Example(update, (x,), (lambda: rate.mul_(0.9), (x,)))
