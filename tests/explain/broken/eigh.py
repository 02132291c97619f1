"""An eigendecomposition in the step."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "capture_unsafe", "line_contains": "torch.linalg.eigh("}


def broken() -> Example:
    def whiten(x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(x.T @ x)
        return x @ vectors * values.clamp_min(1e-6).rsqrt()

    return Example(whiten, (torch.randn(16, 4),))


def repaired() -> Example:
    def whiten(x: Tensor) -> Tensor:
        lower, _ = torch.linalg.cholesky_ex(x.T @ x + 1e-6 * torch.eye(4, device=x.device))
        return torch.linalg.solve_triangular(lower, x.T, upper=False).T

    return Example(whiten, (torch.randn(16, 4),))
