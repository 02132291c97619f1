"""A recurrent network, which Dynamo does not trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "graph_break", "line_contains": "self.recurrent(x)", "op": "nn.LSTM"}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(x)
        return y.relu()


class ByCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = memory = x.new_zeros(x.shape[1:])
        found = []
        for step in x:
            hidden, memory = self.cell(step, (hidden, memory))
            found.append(hidden)
        return torch.stack(found).relu()


def broken() -> Example:
    return Example(Recurrent(), (torch.randn(3, 2, 4),))


def repaired() -> Example:
    return Example(ByCells(), (torch.randn(3, 2, 4),))
