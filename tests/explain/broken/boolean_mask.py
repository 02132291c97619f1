"""A selection whose size depends on the data."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "errors[valid]"}


def broken() -> Example:
    def masked_mean(errors: Tensor, valid: Tensor) -> Tensor:
        return errors[valid].mean()

    return Example(masked_mean, (torch.randn(8), torch.arange(8) < 5))


def repaired() -> Example:
    def masked_mean(errors: Tensor, valid: Tensor) -> Tensor:
        return (errors * valid).sum() / valid.sum()

    return Example(masked_mean, (torch.randn(8), torch.arange(8) < 5))
