"""A tensor that goes through numpy's sine. On a CPU Dynamo writes torch's sine down, and nothing breaks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "np.sin(", "op": "np.sin"}


def broken() -> Example:
    def wave(x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.numpy())).relu()

    return Example(wave, (torch.randn(4),))


def repaired() -> Example:
    def wave(x: Tensor) -> Tensor:
        return torch.sin(x).relu()

    return Example(wave, (torch.randn(4),))
