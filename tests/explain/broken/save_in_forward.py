"""A checkpoint written from inside the model."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "side_effect", "line_contains": "torch.save("}


def broken() -> Example:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x).relu()
            torch.save(hidden, tempfile.gettempdir() + "/hidden.pt")
            return hidden + 1

    return Example(Block(), (torch.randn(4, 8),))


def repaired() -> Example:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.linear(x).relu()
            return hidden + 1, hidden

    return Example(Block(), (torch.randn(4, 8),))
