"""Muon (Jordan 2024) in torch.optim.Muon's convention; both lr adjustments (the second: arXiv 2502.16982).

    B = mu B + (1 - mu) g
    U = (1 - mu) g + mu B  (Nesterov)  or  B
    p = (1 - lr wd) p - lr s(r, c) NS(U)
    s = sqrt(max(1, r / c))  ("original")  or  0.2 sqrt(max(r, c))  ("match_rms_adamw")

Decay takes the unadjusted lr. A tensor of more than two axes is flattened to [first, rest].
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from tests.oracles.adamw import AdamW
from tests.oracles.newton_schulz import JORDAN, Coefficients, newton_schulz
from tests.oracles.protocol import Array, Given, Tensors, float64_copies

AdjustLr = Literal["original", "match_rms_adamw"]


class Muon:
    """Muon on the names in `spectral`; `AdamW(**scalar)` on the others (`.scalar`, with its own lr)."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: AdjustLr = "original",
        coefficients: Coefficients = JORDAN,
        n_steps: int = 5,
        scalar: Mapping[str, Any] | None = None,
    ) -> None:
        self.spectral = tuple(spectral)
        self.scalar = AdamW({n: p for n, p in params.items() if n not in self.spectral}, **(scalar or {}))
        self.params = float64_copies(params) | self.scalar.params  # the scalars' arrays are shared, and moved in place
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay
        self.scale: AdjustLr = scale
        self.coefficients, self.n_steps = coefficients, n_steps
        self.buffer = {name: np.zeros_like(self.params[name]) for name in self.spectral}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        self.scalar.step({name: g[name] for name in self.scalar.params})
        for name in self.spectral:
            p = self.params[name]
            self.buffer[name] = self.momentum * self.buffer[name] + (1 - self.momentum) * g[name]
            u = self.buffer[name]
            if self.nesterov:
                u = (1 - self.momentum) * g[name] + self.momentum * u
            u = as_matrix(u)
            direction = newton_schulz(u, self.coefficients, self.n_steps)
            p *= 1 - self.lr * self.weight_decay
            p -= self.lr * lr_factor(self.scale, *u.shape) * direction.reshape(p.shape)


def as_matrix(array: Array) -> Array:
    """[r, c] as it is; [r, ...] flattened to [r, rest]."""
    return array.reshape(array.shape[0], -1)


def lr_factor(scale: AdjustLr, rows: int, cols: int) -> float:
    """s(r, c) of the module docstring."""
    if scale == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols))
