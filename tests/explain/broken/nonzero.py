"""The positions of nonzero entries, whose number depends on the data."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "nonzero()"}


def broken() -> Example:
    def positions(x: Tensor) -> Tensor:
        return x.nonzero().sum(0)

    return Example(positions, (torch.eye(4),))


def repaired() -> Example:
    def positions(x: Tensor) -> Tensor:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
        found = x != 0
        return torch.stack([(found * rows[:, None]).sum(), (found * columns).sum()])

    return Example(positions, (torch.eye(4),))
