"""A linear solve that reads its error code."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "torch.linalg.solve("}


def broken() -> Example:
    def preconditioned(grad: Tensor, statistics: Tensor) -> Tensor:
        return torch.linalg.solve(statistics, grad)

    return Example(preconditioned, (torch.randn(4, 8), 2 * torch.eye(4)))


def repaired() -> Example:
    def preconditioned(grad: Tensor, statistics: Tensor) -> Tensor:
        lower, _ = torch.linalg.cholesky_ex(statistics, check_errors=False)
        half = torch.linalg.solve_triangular(lower, grad, upper=False)
        return torch.linalg.solve_triangular(lower.mT, half, upper=True)

    return Example(preconditioned, (torch.randn(4, 8), 2 * torch.eye(4)))
