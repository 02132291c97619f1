"""The full recipe in float64: MONA, momentum, KL-Shampoo, Newton-Schulz, NorMuon and Schedule-Free, one after another.

    Gt = MONA(g);   m = mu m + (1 - mu) Gt;   D = S_a^(-1/2) m S_b^(-1/2)   (S from the raw g; 0 at update 1)
    P = NS(D);   v_i = b2 v_i + (1 - b2) mean_j P_ij^2;   Phat = P / (sqrt(v) + eps)
    z = (1 - lr wd) z - 0.2 lr sqrt(r c) Phat / ||Phat||;   x, y as in Schedule-Free with weights lr_max^2

The parts are the twins of their own papers; the other tensors are Schedule-Free AdamW's with decay at z.
"""

import math
from collections.abc import Collection

import numpy as np

from tests.oracles.kl_shampoo import KLShampoo
from tests.oracles.mona import Mona
from tests.oracles.newton_schulz import JORDAN, newton_schulz
from tests.oracles.protocol import Given, Tensors, float64_copies
from tests.oracles.sf_adamw import SFAdamW


class FullFusion:
    """On the names in `spectral`, which have gradients of full rank (null spaces have no basis of their own)."""

    def __init__(
        self, params: Given, *, spectral: Collection[str], lr: float, every: int = 10, weight_decay: float = 0.05
    ) -> None:
        self.names = tuple(params)
        matrices = {n: params[n] for n in spectral}
        self.x, self.y, self.z = (float64_copies(matrices) for _ in range(3))
        self.mona = Mona(matrices)
        self.factors = KLShampoo(matrices, spectral=spectral, betas=(0.0, 0.98), every=every)
        self.m = {n: np.zeros_like(p) for n, p in self.z.items()}
        self.v = {n: np.zeros((p.shape[0], 1)) for n, p in self.z.items()}
        rest = {n: p for n, p in params.items() if n not in matrices}
        self.scalar = SFAdamW(rest, lr=lr, weight_decay=weight_decay, decay_at="z")
        self.lr, self.weight_decay, self.every = lr, weight_decay, every
        self.updates, self.weight_sum = 0, 0.0

    def gradient_point(self) -> Tensors:
        y = float64_copies(self.y) | self.scalar.gradient_point()
        return {n: y[n] for n in self.names}

    def weights(self) -> Tensors:
        x = float64_copies(self.x) | self.scalar.weights()
        return {n: x[n] for n in self.names}

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        self.scalar.step({n: g[n] for n in self.scalar.z})
        self.updates += 1
        self.weight_sum += self.lr**2
        c = self.lr**2 / self.weight_sum
        augmented = self.mona.direction({n: g[n] for n in self.z})
        for name, z in self.z.items():
            self.m[name] = 0.8 * self.m[name] + 0.2 * augmented[name]
            direction = self._preconditioned(name, g[name])
            polar = newton_schulz(direction, JORDAN)
            self.v[name] = 0.95 * self.v[name] + 0.05 * np.mean(polar**2, axis=1, keepdims=True)
            p_hat = polar / (np.sqrt(self.v[name]) + 1e-8)
            norm = float(np.linalg.norm(p_hat))
            z *= 1 - self.lr * self.weight_decay
            if norm > 0:
                z -= 0.2 * self.lr * math.sqrt(p_hat.size) / norm * p_hat
            self.x[name] = (1 - c) * self.x[name] + c * z
            self.y[name] = 0.9 * self.x[name] + 0.1 * z

    def _preconditioned(self, name: str, g: np.ndarray) -> np.ndarray:
        """The direction from the factors before this gradient; then the factors, and every so often the bases."""
        if self.updates == 1:
            self.factors._start(name, g)
            return np.zeros_like(g)
        direction = self.factors._direction(name, self.m[name])
        self.factors._measure(name, g)
        if (self.updates - 1) % self.every == 0:
            self.factors._refresh(name)
        return direction
