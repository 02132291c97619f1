"""A debugging print that was left in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "side_effect", "line_contains": "print("}


def broken() -> Example:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            print("hidden", hidden.shape)
            return hidden.relu()

    return Example(Block(), (torch.randn(4, 8),))


def repaired() -> Example:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.linear(x)
            return hidden.relu(), hidden

    return Example(Block(), (torch.randn(4, 8),))
