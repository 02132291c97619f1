"""A model that is evaluated between two steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {
    "kind": "recompile",
    "line_contains": "self.training",
    "op": "self.training",
    "why_contains": "compiled in train mode",
}


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.1, self.training)


def broken() -> Example:
    model, x = Drops(), torch.randn(3)
    return Example(model, (x,), (model.eval, (x,), model.train, (x,)))


def repaired() -> Example:
    model, x = Drops(), torch.randn(3)
    return Example(model, (x,), (model.train, (x,)))
