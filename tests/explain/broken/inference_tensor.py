"""Latents from a cache that was made under inference_mode, and others that were not."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "recompile", "line_contains": "latents * 2", "op": "latents", "why_contains": "inference_mode"}


def scaled(latents: Tensor) -> Tensor:
    return latents * 2


def of_the_cache() -> Tensor:
    with torch.inference_mode():
        return torch.randn(3)


def broken() -> Example:
    return Example(scaled, (torch.randn(3),), ((of_the_cache(),),))


def repaired() -> Example:
    return Example(scaled, (torch.randn(3),), ((of_the_cache().clone(),),))
