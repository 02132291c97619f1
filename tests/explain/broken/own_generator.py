"""Noise from a generator of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "graph_break", "line_contains": "generator=generator", "op": "torch.Generator"}


def broken() -> Example:
    generator = torch.Generator().manual_seed(0)

    def noised(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=generator, device=x.device)

    return Example(noised, (torch.randn(3),))


def repaired() -> Example:
    def noised(x: Tensor, noise: Tensor) -> Tensor:
        return x + noise

    return Example(noised, (torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(0))))
