"""A step count that is a Python int and grows."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "python_scalar", "line_contains": "0.9**step"}


def broken() -> Example:
    def unbiased(moment: Tensor, step: int) -> Tensor:
        return moment / (1 - 0.9**step)

    moment = torch.randn(8)
    return Example(unbiased, (moment, 1), ((moment, 2), (moment, 3)))


def repaired() -> Example:
    def unbiased(moment: Tensor, step: Tensor) -> Tensor:
        return moment / (1 - 0.9**step)

    moment = torch.randn(8)
    return Example(unbiased, (moment, torch.tensor(1)), ((moment, torch.tensor(2)), (moment, torch.tensor(3))))
