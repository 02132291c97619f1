"""A detour through numpy for a function that torch also has."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "host_sync", "line_contains": "np."}


def broken() -> Example:
    def corrected(x: Tensor) -> Tensor:
        curve = torch.from_numpy(np.interp(x.numpy(), [0.0, 1.0], [0.0, 2.0]))
        return curve.relu()

    return Example(corrected, (torch.rand(16),))


def repaired() -> Example:
    def corrected(x: Tensor) -> Tensor:
        curve = torch.lerp(torch.zeros_like(x), torch.full_like(x, 2.0), x.clamp(0, 1))
        return curve.relu()

    return Example(corrected, (torch.rand(16),))
