"""The optimizer's step inside the compiled function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "graph_break", "line_contains": "optimizer.step()"}


def broken() -> Example:
    parameter = nn.Parameter(torch.randn(8))
    parameter.grad = torch.randn(8)
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def evaluate_and_step(x: Tensor) -> Tensor:
        value = (parameter.detach() * x).sum()
        optimizer.step()
        return value

    return Example(evaluate_and_step, (torch.randn(8),))


def repaired() -> Example:
    parameter = nn.Parameter(torch.randn(8))

    def evaluate(x: Tensor) -> Tensor:
        return (parameter.detach() * x).sum()

    return Example(evaluate, (torch.randn(8),))
