"""Three relatives of Adam in float64: ADOPT (2411.02853), AdaBelief (2010.07468), AdamP (2006.08217).

ADOPT      first v = g^2 only; then m = lerp(m, clip(g / max(sqrt v, e), t^(1/4)), 1 - b1); p -= lr m;
           and after that v = b2 v + (1 - b2) g^2
AdaBelief  s = b2 s + (1 - b2)(g - m)^2 + e;  p -= lr (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + e)
           both: p *= 1 - lr wd before
AdamP      Adam's u, without its part along p (by row, else whole) where max |cos(g, p)| < 0.1 / sqrt n
"""

import numpy as np

from tests.oracles.protocol import Array, Given, Tensors, float64_copies


class _Moments:
    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.betas, self.eps, self.weight_decay, self.t = lr, betas, eps, weight_decay, 0
        self.m = {n: np.zeros_like(p) for n, p in self.params.items()}
        self.v = {n: np.zeros_like(p) for n, p in self.params.items()}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)


class Adopt(_Moments):
    def step(self, grads: Given) -> None:
        b1, b2 = self.betas
        for n, g in float64_copies(grads).items():
            self.params[n] *= 1 - self.lr * self.weight_decay
            if self.t == 0:
                self.v[n] = g * g
                continue
            normed = np.clip(g / np.maximum(np.sqrt(self.v[n]), self.eps), -(self.t**0.25), self.t**0.25)
            self.m[n] += (1 - b1) * (normed - self.m[n])
            self.params[n] -= self.lr * self.m[n]
            self.v[n] = b2 * self.v[n] + (1 - b2) * g * g
        self.t += 1


class AdaBelief(_Moments):
    def step(self, grads: Given) -> None:
        self.t += 1
        b1, b2 = self.betas
        for n, g in float64_copies(grads).items():
            self.params[n] *= 1 - self.lr * self.weight_decay
            self.m[n] += (1 - b1) * (g - self.m[n])
            self.v[n] = b2 * self.v[n] + (1 - b2) * (g - self.m[n]) ** 2 + self.eps
            root = np.sqrt(self.v[n] / (1 - b2**self.t)) + self.eps
            self.params[n] -= self.lr * self.m[n] / (1 - b1**self.t) / root


class AdamP(_Moments):
    def step(self, grads: Given) -> None:
        self.t += 1
        b1, b2 = self.betas
        for n, g in float64_copies(grads).items():
            p = self.params[n]
            self.m[n] += (1 - b1) * (g - self.m[n])
            self.v[n] = b2 * self.v[n] + (1 - b2) * g * g
            u = self.m[n] / (1 - b1**self.t) / (np.sqrt(self.v[n]) / np.sqrt(1 - b2**self.t) + self.eps)
            ratio = 1.0
            if p.ndim > 1:
                u, ratio = self._projected(u, p, g)
            p *= 1 - self.lr * self.weight_decay * ratio
            p -= self.lr * u

    @staticmethod
    def _projected(u: Array, p: Array, g: Array) -> tuple[Array, float]:
        for rows in (p.shape[0], 1):
            q, h, w = p.reshape(rows, -1), g.reshape(rows, -1), u.reshape(rows, -1)
            norm = np.linalg.norm(q, axis=1)
            cosine = np.abs((q * h).sum(1)) / np.maximum(norm * np.linalg.norm(h, axis=1), 1e-8)
            if cosine.max() < 0.1 / np.sqrt(q.shape[1]):
                unit = q / (norm[:, None] + 1e-8)
                return (w - unit * (unit * w).sum(1, keepdims=True)).reshape(p.shape), 0.1
        return u, 1.0
