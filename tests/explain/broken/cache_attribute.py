"""A cache of keys that a module holds as a plain attribute and writes into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "unmarked_mutation", "line_contains": "index_copy_", "op": "keys"}


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.keys = torch.zeros(2, 8, 4)

    @torch.no_grad()
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.keys.index_copy_(1, position, self.project(x))
        return self.keys.sum(1)


class Buffer(Attribute):
    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        del self.keys
        self.register_buffer("keys", torch.zeros(2, 8, 4), persistent=False)


def broken() -> Example:
    x, position = torch.randn(2, 1, 4), torch.tensor([0])
    return Example(Attribute(), (x, position), ((x, position + 1),))


def repaired() -> Example:
    x, position = torch.randn(2, 1, 4), torch.tensor([0])
    return Example(Buffer(), (x, position), ((x, position + 1),))
