"""The last batch of the epoch is smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "dynamic_shape", "line_contains": "images.flatten("}


def broken() -> Example:
    weight = torch.randn(16, 8)

    def classify(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    return Example(classify, (torch.randn(8, 4, 4),), ((torch.randn(6, 4, 4),),))


def repaired() -> Example:
    weight = torch.randn(16, 8)

    def classify(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    padded = torch.cat([torch.randn(6, 4, 4), torch.zeros(2, 4, 4)])
    return Example(classify, (torch.randn(8, 4, 4),), ((padded,),))
