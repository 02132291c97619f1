"""NorMuon, arXiv 2510.05491: Muon with a row-wise second moment of its orthogonalized update.

    O as in Muon (EMA momentum, Nesterov, NS);    v_i = b2 v_i + (1 - b2) mean_j O_ij^2   (no bias correction)
    Ohat = O / (sqrt(v) + eps)
    "preserve_norm" (the official code):  Ohat *= ||O|| / (||Ohat|| + 1e-10);   p -= lr sqrt(max(1, r/c)) Ohat
    "match_rms" (Algorithm 1 of the paper):  p -= lr 0.2 sqrt(r c) / (||Ohat|| + 1e-10) Ohat

Decay first, p *= 1 - lr wd. Source of the first form: zichongli5/NorMuon `normuon.py`; of the second: pytorch_optimizer
4.1.0. The paper has no 1e-10 in the last norm; the codes do, against a zero update.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from tests.oracles.adamw import AdamW
from tests.oracles.muon import as_matrix
from tests.oracles.newton_schulz import JORDAN_KELLER, Coefficients, newton_schulz
from tests.oracles.protocol import Given, Tensors, float64_copies

UpdateScale = Literal["preserve_norm", "match_rms"]
NORM_EPS = 1e-10


class NorMuon:
    """NorMuon on the names in `spectral`; `AdamW(**scalar)` on the others (`.scalar`, with its own lr)."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        beta2: float = 0.95,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        update_scale: UpdateScale = "preserve_norm",
        coefficients: Coefficients = JORDAN_KELLER,
        n_steps: int = 5,
        scalar: Mapping[str, Any] | None = None,
    ) -> None:
        self.spectral = tuple(spectral)
        self.scalar = AdamW({n: p for n, p in params.items() if n not in self.spectral}, **(scalar or {}))
        self.params = float64_copies(params) | self.scalar.params  # the scalars' arrays are shared, and moved in place
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay
        self.beta2, self.eps = beta2, eps
        self.update_scale: UpdateScale = update_scale
        self.coefficients, self.n_steps = coefficients, n_steps
        self.buffer = {name: np.zeros_like(self.params[name]) for name in self.spectral}
        self.v = {name: np.zeros((self.params[name].shape[0], 1)) for name in self.spectral}

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
            o = newton_schulz(as_matrix(u), self.coefficients, self.n_steps)
            rows, cols = o.shape
            self.v[name] = self.beta2 * self.v[name] + (1 - self.beta2) * np.mean(o**2, axis=1, keepdims=True)
            o_hat = o / (np.sqrt(self.v[name]) + self.eps)
            norm_hat = float(np.linalg.norm(o_hat)) + NORM_EPS
            if self.update_scale == "preserve_norm":
                factor = math.sqrt(max(1.0, rows / cols)) * float(np.linalg.norm(o)) / norm_hat
            else:
                factor = 0.2 * math.sqrt(rows * cols) / norm_hat
            p *= 1 - self.lr * self.weight_decay
            p -= self.lr * factor * o_hat.reshape(p.shape)
