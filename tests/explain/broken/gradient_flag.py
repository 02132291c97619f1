"""The same input sometimes asks for a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "recompile", "line_contains": "x * 2", "op": "x", "why_contains": "(from False to True)"}


def doubled(x: Tensor) -> Tensor:
    return x * 2


def broken() -> Example:
    return Example(doubled, (torch.randn(3),), ((torch.randn(3, requires_grad=True),),))


def repaired() -> Example:
    return Example(doubled, (torch.randn(3),), ((torch.randn(3, requires_grad=True).detach(),),))
