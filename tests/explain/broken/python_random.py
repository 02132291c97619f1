"""A random number from Python instead of torch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "side_effect", "line_contains": "random.random()"}


def broken() -> Example:
    def jitter(x: Tensor) -> Tensor:
        return x * random.random()

    return Example(jitter, (torch.randn(8),))


def repaired() -> Example:
    def jitter(x: Tensor) -> Tensor:
        return x * torch.rand((), device=x.device)

    return Example(jitter, (torch.randn(8),))
