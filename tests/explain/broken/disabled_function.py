"""A function that is excluded from compilation."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "graph_break", "line_contains": "normalize(x)"}


def broken() -> Example:
    @torch.compiler.disable
    def normalize(x: Tensor) -> Tensor:
        return x / x.norm()

    def scaled(x: Tensor) -> Tensor:
        return normalize(x) * 2

    return Example(scaled, (torch.randn(8),))


def repaired() -> Example:
    def normalize(x: Tensor) -> Tensor:
        return x / x.norm()

    def scaled(x: Tensor) -> Tensor:
        return normalize(x) * 2

    return Example(scaled, (torch.randn(8),))
