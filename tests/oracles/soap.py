"""SOAP, arXiv 2409.11321: Adam in the eigenbasis of Shampoo's factors.

    update 1:  L = (1 - b) G G^T,  R = (1 - b) G^T G;  Q = eigenvectors, by falling eigenvalue;  the weights do not move
    later:     H = Q_L^T G Q_R;  m = b1 m + (1 - b1) H,  v = b2 v + (1 - b2) H^2;  t = updates - 1
               p -= lr sqrt(1 - b2^t) / (1 - b1^t) Q_L (m / (sqrt(v) + eps)) Q_R^T;  p -= lr wd p
               L = b L + (1 - b) G G^T,  R = b R + (1 - b) G^T G
    every T:   columns of Q, and v alike, sorted by falling diag(Q^T L Q);  Q = QR(L Q).Q;  m is rotated into the new Q

Source: nikhilvyas/SOAP `soap.py`, which counts from update 2: T = 10 refreshes after updates 11, 21, ...
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tests.oracles.adamw import AdamW
from tests.oracles.kl_shampoo import Sides, first_basis
from tests.oracles.protocol import Array, Given, Tensors, float64_copies


class Soap:
    """SOAP on the names in `spectral`; `AdamW(**scalar)` on the others (`.scalar`, with its own lr)."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 10,
        scalar: Mapping[str, Any] | None = None,
    ) -> None:
        self.spectral = tuple(spectral)
        self.scalar = AdamW({n: p for n, p in params.items() if n not in self.spectral}, **(scalar or {}))
        self.params = float64_copies(params) | self.scalar.params  # the scalars' arrays are shared, and moved in place
        self.lr, self.betas, self.weight_decay, self.eps = lr, betas, weight_decay, eps
        self.shampoo_beta, self.every = shampoo_beta, every
        self.updates = 0
        self.m = {n: np.zeros_like(self.params[n]) for n in self.spectral}
        self.v = {n: np.zeros_like(self.params[n]) for n in self.spectral}
        self.factors = {n: _zero_factors(self.params[n]) for n in self.spectral}
        self.bases: dict[str, Sides] = {}  # a test may put others in: null spaces have no basis of their own

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        self.updates += 1
        self.scalar.step({name: g[name] for name in self.scalar.params})
        for name in self.spectral:
            if self.updates > 1:
                p = self.params[name]
                p -= self.lr * self._direction(name, g[name])
                p -= self.lr * self.weight_decay * p
            b, (left, right) = self.shampoo_beta, self.factors[name]
            left, right = b * left + (1 - b) * (g[name] @ g[name].T), b * right + (1 - b) * (g[name].T @ g[name])
            self.factors[name] = left, right
            if self.updates == 1:
                self.bases[name] = first_basis(left), first_basis(right)
            elif (self.updates - 1) % self.every == 0:
                self._refresh(name)

    def _direction(self, name: str, g: Array) -> Array:
        ql, qr = self.bases[name]
        b1, b2 = self.betas
        t = self.updates - 1
        rotated = ql.T @ g @ qr
        self.m[name] = b1 * self.m[name] + (1 - b1) * rotated
        self.v[name] = b2 * self.v[name] + (1 - b2) * rotated**2
        step_size = math.sqrt(1 - b2**t) / (1 - b1**t)
        direction: Array = step_size * (ql @ (self.m[name] / (np.sqrt(self.v[name]) + self.eps)) @ qr.T)
        return direction

    def _refresh(self, name: str) -> None:
        (left, right), (ql, qr) = self.factors[name], self.bases[name]
        original = ql @ self.m[name] @ qr.T
        rows, cols = np.argsort(-np.diag(ql.T @ left @ ql)), np.argsort(-np.diag(qr.T @ right @ qr))
        self.v[name] = self.v[name][rows][:, cols]
        ql, qr = np.linalg.qr(left @ ql[:, rows]).Q, np.linalg.qr(right @ qr[:, cols]).Q
        self.m[name] = ql.T @ original @ qr
        self.bases[name] = ql, qr


def _zero_factors(p: Array) -> Sides:
    return np.zeros((p.shape[0],) * 2), np.zeros((p.shape[1],) * 2)
