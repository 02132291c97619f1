"""The time of day in a computation."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "side_effect", "line_contains": "time.time()"}

START = time.time()


def broken() -> Example:
    def stamped(x: Tensor) -> Tensor:
        return x.relu() + (time.time() - START)

    return Example(stamped, (torch.randn(8),))


def repaired() -> Example:
    def stamped(x: Tensor, elapsed: Tensor) -> Tensor:
        return x.relu() + elapsed

    return Example(stamped, (torch.randn(8), torch.tensor(time.time() - START)))
