"""A Cholesky decomposition that reads its error code."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "torch.linalg.cholesky("}


def broken() -> Example:
    def whitened(x: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(x.mT @ x)
        return torch.linalg.solve_triangular(lower, x.mT, upper=False).mT

    return Example(whitened, (torch.randn(16, 4),))


def repaired() -> Example:
    def whitened(x: Tensor) -> Tensor:
        lower, _ = torch.linalg.cholesky_ex(x.mT @ x, check_errors=False)
        return torch.linalg.solve_triangular(lower, x.mT, upper=False).mT

    return Example(whitened, (torch.randn(16, 4),))
