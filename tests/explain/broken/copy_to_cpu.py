"""A metric that is copied to the CPU inside the step."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": ".cpu()"}


def broken() -> Example:
    def evaluated(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        return probabilities, probabilities.max().cpu()

    return Example(evaluated, (torch.randn(4, 8),))


def repaired() -> Example:
    def evaluated(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        return probabilities, probabilities.max()

    return Example(evaluated, (torch.randn(4, 8),))
