"""KL-Shampoo and KL-SOAP, arXiv 2509.03378: Shampoo's factors, each measured with the other one divided out.

    update 1:  S_a = (1 - b) G G^T / n,  S_b = (1 - b) G^T G / m;  Q = eigenvectors, by falling eigenvalue;
               every eigenvalue = init_factor;  the weights do not move and m stays zero
    later:     m = b1 m + (1 - b1) G;  E_ij = 1 / sqrt(l_a,i l_b,j);  D = Q_a ((Q_a^T m Q_b) E / (1 + eps E)) Q_b^T
               p -= lr D;  p -= lr wd p
               S_a = b S_a + (1 - b) G S_b^-1 G^T / n,  S_b alike, S^-1 = Q diag(1 / l) Q^T;  H = Q_a^T G Q_b
               l_a,i = b l_a,i + (1 - b) mean_j H_ij^2 / l_b,j,  l_b alike, both from the old ones
               1 / sqrt(l) <= max(10, min(d, max_inverse_root)) on a side of length d
    every T:   Q = QR(S Q).Q

KL-SOAP: m and v are Adam's moments of H (no bias correction), D = Q_a (m / (sqrt(v) + eps)) Q_b^T; m is rotated with Q.
Source: yorkerlin/KL-Methods `optim/kl_opt.py`, which counts from update 2: T = 10 refreshes after updates 11, 21, ...
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tests.oracles.adamw import AdamW
from tests.oracles.protocol import Array, Given, Tensors, float64_copies

Sides = tuple[Array, Array]


class KLShampoo:
    """KL-Shampoo on the names in `spectral`; `AdamW(**scalar)` on the others. `klsoap`: KL-SOAP."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 10,
        init_factor: float = 0.1,
        max_inverse_root: float = 4000.0,
        klsoap: bool = False,
        scalar: Mapping[str, Any] | None = None,
    ) -> None:
        self.spectral = tuple(spectral)
        self.scalar = AdamW({n: p for n, p in params.items() if n not in self.spectral}, **(scalar or {}))
        self.params = float64_copies(params) | self.scalar.params  # the scalars' arrays are shared, and moved in place
        self.lr, self.betas, self.weight_decay, self.eps = lr, betas, weight_decay, eps
        self.shampoo_beta = betas[1] if shampoo_beta is None else shampoo_beta
        self.every = every
        self.init_factor, self.max_inverse_root, self.klsoap = init_factor, max_inverse_root, klsoap
        self.updates = 0
        self.m = {n: np.zeros_like(self.params[n]) for n in self.spectral}
        self.v = {n: np.zeros_like(self.params[n]) for n in self.spectral}
        self.factors: dict[str, Sides] = {}
        self.bases: dict[str, Sides] = {}  # a test may put others in: null spaces have no basis of their own
        self.eigenvalues: dict[str, Sides] = {}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        self.updates += 1
        self.scalar.step({name: g[name] for name in self.scalar.params})
        for name in self.spectral:
            if self.updates == 1:
                self._start(name, g[name])
                continue
            p = self.params[name]
            p -= self.lr * self._direction(name, g[name])
            p -= self.lr * self.weight_decay * p
            self._measure(name, g[name])
            if self.updates > 1 and (self.updates - 1) % self.every == 0:
                self._refresh(name)

    def _start(self, name: str, g: Array) -> None:
        rows, cols = g.shape
        b = self.shampoo_beta
        self.factors[name] = (1 - b) * (g @ g.T) / cols, (1 - b) * (g.T @ g) / rows
        self.bases[name] = first_basis(self.factors[name][0]), first_basis(self.factors[name][1])
        self.eigenvalues[name] = np.full(rows, self.init_factor), np.full(cols, self.init_factor)

    def _direction(self, name: str, g: Array) -> Array:
        (qa, qb), (la, lb) = self.bases[name], self.eigenvalues[name]
        b1, b2 = self.betas
        if self.klsoap:
            rotated = qa.T @ g @ qb
            self.m[name] = b1 * self.m[name] + (1 - b1) * rotated
            self.v[name] = b2 * self.v[name] + (1 - b2) * rotated**2
            scaled = self.m[name] / (np.sqrt(self.v[name]) + self.eps)
        else:
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            scale = 1 / np.sqrt(np.outer(la, lb))
            scaled = (qa.T @ self.m[name] @ qb) * scale / (1 + self.eps * scale)
        direction: Array = qa @ scaled @ qb.T
        return direction

    def _measure(self, name: str, g: Array) -> None:
        (sa, sb), (qa, qb), (la, lb) = self.factors[name], self.bases[name], self.eigenvalues[name]
        rows, cols = g.shape
        b = self.shampoo_beta
        inverse_a, inverse_b = qa @ np.diag(1 / la) @ qa.T, qb @ np.diag(1 / lb) @ qb.T
        self.factors[name] = (
            b * sa + (1 - b) * (g @ inverse_b @ g.T) / cols,
            b * sb + (1 - b) * (g.T @ inverse_a @ g) / rows,
        )
        h = qa.T @ g @ qb
        self.eigenvalues[name] = (
            self._bounded(b * la + (1 - b) * np.mean(h**2 / lb, axis=1)),
            self._bounded(b * lb + (1 - b) * np.mean(h**2 / la[:, None], axis=0)),
        )

    def _bounded(self, eigenvalues: Array) -> Array:
        highest_root = max(10.0, min(float(len(eigenvalues)), self.max_inverse_root))
        bounded: Array = np.maximum(eigenvalues, highest_root**-2)
        return bounded

    def _refresh(self, name: str) -> None:
        (sa, sb), (qa, qb) = self.factors[name], self.bases[name]
        original = qa @ self.m[name] @ qb.T
        qa, qb = np.linalg.qr(sa @ qa).Q, np.linalg.qr(sb @ qb).Q
        if self.klsoap:
            self.m[name] = qa.T @ original @ qb
        self.bases[name] = qa, qb


def first_basis(s: Array) -> Array:
    """Eigenvectors as columns, by falling eigenvalue."""
    return np.array(np.linalg.eigh(s).eigenvectors[:, ::-1])
