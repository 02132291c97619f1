"""K-Optimizers' Adakaon, Nekaon, AdaPNM and AdaMuon in float64, from the study's equations.

r = b2 r + (1 - b2) mean_columns(g^2 + e);  c alike;  u = g / sqrt(r c / mean(r)), clipped to rms 1
m = lerp(m, lr u, 1 - b1);  delta = m + lr wd p;  mask = [delta g > 0] / max(mean, 1e-3);  p -= mask delta
"""

import numpy as np

from tests.oracles.newton_schulz import newton_schulz
from tests.oracles.protocol import Array, Given, Tensors, float64_copies


def centred(g: Array) -> Array:
    return g - g.mean(-1, keepdims=True) if g.ndim > 1 else g


def clipped(u: Array, threshold: float = 1.0) -> Array:
    return u / max(1.0, float(np.sqrt(np.mean(u * u))) / threshold)


def masked(delta: Array, g: Array) -> Array:
    mask = (np.sign(delta) * np.sign(g) > 0).astype(np.float64)
    return delta * mask / max(float(mask.mean()), 1e-3)


class Factored:
    """The second moment of one tensor."""

    def __init__(self, p: Array, eps: float) -> None:
        self.eps = eps
        self.row = np.zeros(p.shape[:1]) if p.ndim > 1 else np.zeros_like(p)
        self.column = np.zeros(p.shape[1:])

    def root(self, g: Array, b2: float) -> Array:
        """Its root, with one more gradient."""
        square = g * g + self.eps
        if g.ndim == 1:
            self.row = b2 * self.row + (1 - b2) * square
            return np.sqrt(self.row)
        self.row = b2 * self.row + (1 - b2) * square.mean(1)
        self.column = b2 * self.column + (1 - b2) * square.mean(0)
        return np.sqrt(np.outer(self.row / self.row.mean(), self.column))


class Adakaon:
    """`k` > 0: Nekaon. `ns_steps` > 0: AdaMuon, whose matrices keep their momentum before Newton-Schulz."""

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        k: float = 0.0,
        is_cautious: bool = True,
        centralize: bool = True,
        ns_steps: int = 0,
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.betas, self.weight_decay, self.k = lr, betas, weight_decay, k
        self.is_cautious, self.centralize, self.ns_steps = is_cautious, centralize, ns_steps
        self.m = {n: np.zeros_like(p) for n, p in self.params.items()}
        self.v = {n: Factored(p, 1e-30) for n, p in self.params.items()}

    def gradient_point(self) -> Tensors:
        room = self.k * self.lr
        return {n: p - np.clip(self.k * self.m[n], -room, room) for n, p in self.params.items()}

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        b1, b2 = self.betas
        factor = 0.2 if self.ns_steps else 1.0
        for n, given in float64_copies(grads).items():
            g = centred(given) if self.centralize else given
            if self.ns_steps and g.ndim > 1:
                self.m[n] += (1 - b1) * (g - self.m[n])
                o = newton_schulz(self.m[n], n_steps=self.ns_steps)
                delta = factor * self.lr * clipped(o / self.v[n].root(o, b2))
            else:
                u = factor * self.lr * clipped(g / self.v[n].root(g, b2))
                self.m[n] += (1 - b1) * (u - self.m[n])
                delta = self.m[n]
            delta = delta + self.lr * self.weight_decay * self.params[n]
            self.params[n] -= masked(delta, g) if self.is_cautious else delta


class AdaPNM:
    """`eps` None: 1e-30 in the squares, and nothing else."""

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.8, 0.999),
        beta0: float = 0.5,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.betas, self.beta0, self.weight_decay = lr, betas, beta0, weight_decay
        self.pair = {n: [np.zeros_like(p), np.zeros_like(p)] for n, p in self.params.items()}
        self.v = {n: Factored(p, 1e-30) for n, p in self.params.items()}
        self.t = 0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        self.t += 1
        (b1, b2), b0 = self.betas, self.beta0
        for n, given in float64_copies(grads).items():
            g, pair, at = centred(given), self.pair[n], (self.t + 1) % 2
            pair[at] = b1**2 * pair[at] + (1 - b1**2) * g
            noisy = ((1 + b0) * pair[at] - b0 * pair[1 - at]) / np.sqrt((1 + b0) ** 2 + b0**2)
            u = masked(clipped(noisy * np.sqrt(1 - b2**self.t) / self.v[n].root(g, b2)), g)
            self.params[n] *= 1 - self.lr * self.weight_decay
            self.params[n] -= self.lr / (1 - b1**self.t) * u
