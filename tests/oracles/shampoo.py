"""Shampoo, arXiv 1802.09568, with running averages (2002.09018) and roots that are renewed every T updates.

    m = b1 m + (1 - b1) G;  D = P_L m P_R;  P = I at update 1, so that it is plain momentum
    L = b L + (1 - b) G G^T,  R = b R + (1 - b) G^T G
    after updates 1, 1 + T, ...:  P_L = (L + ridge ||L|| I)^(-1/4), ||L|| the largest row sum;  P_R alike
    graft "norm":  D *= ||m|| / ||D||

The roots are exact here, by an eigendecomposition.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from tests.oracles.adamw import AdamW
from tests.oracles.protocol import Array, Given, Tensors, float64_copies

Graft = Literal["none", "norm"]


class Shampoo:
    """Shampoo on the names in `spectral`; `AdamW(**scalar)` on the others (`.scalar`, with its own lr)."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        lr: float = 1e-3,
        beta1: float = 0.9,
        shampoo_beta: float = 0.95,
        every: int = 10,
        ridge: float = 1e-4,
        graft: Graft = "none",
        scalar: Mapping[str, Any] | None = None,
    ) -> None:
        self.spectral = tuple(spectral)
        self.scalar = AdamW({n: p for n, p in params.items() if n not in self.spectral}, **(scalar or {}))
        self.params = float64_copies(params) | self.scalar.params  # the scalars' arrays are shared, and moved in place
        self.lr, self.beta1, self.shampoo_beta = lr, beta1, shampoo_beta
        self.every, self.ridge = every, ridge
        self.graft: Graft = graft
        self.updates = 0
        self.m = {n: np.zeros_like(self.params[n]) for n in self.spectral}
        self.factors = {n: tuple(np.zeros((d, d)) for d in self.params[n].shape) for n in self.spectral}
        self.roots = {n: tuple(np.eye(d) for d in self.params[n].shape) for n in self.spectral}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        self.updates += 1
        self.scalar.step({name: g[name] for name in self.scalar.params})
        for name in self.spectral:
            self.m[name] = self.beta1 * self.m[name] + (1 - self.beta1) * g[name]
            left_root, right_root = self.roots[name]
            direction = left_root @ self.m[name] @ right_root
            if self.graft == "norm":
                direction *= np.linalg.norm(self.m[name]) / np.linalg.norm(direction)
            p = self.params[name]
            p -= self.lr * direction
            b, (left, right) = self.shampoo_beta, self.factors[name]
            self.factors[name] = b * left + (1 - b) * (g[name] @ g[name].T), b * right + (1 - b) * (g[name].T @ g[name])
            if (self.updates - 1) % self.every == 0:
                self.roots[name] = tuple(inverse_root(s, 4, self.ridge) for s in self.factors[name])


def inverse_root(s: Array, p: int, ridge: float) -> Array:
    """(S + ridge ||S|| I)^(-1/p), ||S|| the largest sum of a row's absolute values."""
    norm = np.abs(s).sum(axis=1).max()
    values, vectors = np.linalg.eigh(s)
    # What rounding has made of a zero eigenvalue may be negative.
    root: Array = (vectors * (np.maximum(values, 0) + ridge * norm) ** (-1 / p)) @ vectors.T
    return root
