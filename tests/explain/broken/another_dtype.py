"""A batch that comes in double precision once."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {
    "kind": "recompile",
    "line_contains": "batch.mean()",
    "op": "batch",
    "why_contains": "dtype of batch changed (from float32 to float64)",
}


def centred(batch: Tensor) -> Tensor:
    return batch - batch.mean()


def broken() -> Example:
    return Example(centred, (torch.randn(3),), ((torch.randn(3).double(),),))


def repaired() -> Example:
    return Example(centred, (torch.randn(3),), ((torch.randn(3).double().float(),),))
