"""An explanation that several tests read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusion_compile as fc


@pytest.fixture(scope="session")
def explanation() -> fc.Explanation:
    """Of a program that breaks, so that nothing in it is empty."""

    def program(x: Tensor, scale: float) -> Tensor:
        x.add_(1)
        if x.sum() > 0:
            x = x * scale
        return torch.linalg.eigh(x @ x.T)[0]

    return fc.explain(program, (torch.ones(3, 3), 2.0), backend="eager")
