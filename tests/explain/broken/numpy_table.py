"""A table of sines that numpy computes in forward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "cpu_tensor", "line_contains": "np.where(", "op": "np.where"}


class ByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        position, at = np.arange(x.shape[1])[:, None], np.arange(x.shape[2])
        angle = position / 10000 ** (at / x.shape[2])
        table = np.where(at % 2 == 0, np.sin(angle), np.cos(angle))
        return x + torch.from_numpy(table).to(x)


class ByTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)[:, None]
        at = torch.arange(x.shape[2], device=x.device)
        angle = position / 10000 ** (at / x.shape[2])
        return x + torch.where(at % 2 == 0, angle.sin(), angle.cos())


def broken() -> Example:
    return Example(ByNumpy(), (torch.randn(2, 4, 6),))


def repaired() -> Example:
    return Example(ByTorch(), (torch.randn(2, 4, 6),))
