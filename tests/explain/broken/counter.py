"""A count of the calls, which nobody reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {
    "kind": "python_scalar",
    "line_contains": "self.batches_so_far += 1",
    "op": "self.batches_so_far",
    "remedy_contains": "Nothing else in its file reads it",
}


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batches_so_far = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches_so_far += 1
        return x.relu()


def broken() -> Example:
    return Example(Counts(), (torch.randn(3),), ((torch.randn(3),),) * 2)


def repaired() -> Example:
    return Example(nn.ReLU(), (torch.randn(3),), ((torch.randn(3),),) * 2)
