"""A batch dictionary that has one more entry in some calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "recompile", "line_contains": "batch.values()"}


def broken() -> Example:
    def total(batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([value.mean() for value in batch.values()]).sum()

    image, mask = torch.randn(8), torch.ones(8)
    return Example(total, ({"image": image},), (({"image": image, "mask": mask},),))


def repaired() -> Example:
    def total(batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([value.mean() for value in batch.values()]).sum()

    image, mask = torch.randn(8), torch.ones(8)
    return Example(total, ({"image": image, "mask": mask},), (({"image": image, "mask": mask},),))
