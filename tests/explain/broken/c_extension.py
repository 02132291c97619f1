"""A compiled function that Dynamo cannot trace into."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "graph_break", "line_contains": "zlib.crc32("}


def broken() -> Example:
    def seeded(x: Tensor) -> Tensor:
        return x.relu() * (zlib.crc32(b"seed") % 7)

    return Example(seeded, (torch.randn(8),))


def repaired() -> Example:
    seed = zlib.crc32(b"seed") % 7

    def seeded(x: Tensor) -> Tensor:
        return x.relu() * seed

    return Example(seeded, (torch.randn(8),))
