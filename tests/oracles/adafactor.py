"""Adafactor with relative steps, arXiv 1804.04235, as torch.optim.Adafactor spells it.

1 - b2_t = t^-0.8; v factored; u = g / max(sqrt v, e1), clipped to rms 1; p -= min(lr, 1/sqrt t) max(1e-3, rms p) u
"""

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


class Adafactor:
    """`eps`: the bound on the root of v; that of the dtype that is compared with."""

    def __init__(self, params: Given, *, lr: float = 1e-2, weight_decay: float = 0.0, eps: float = 2.0**-52) -> None:
        self.params = float64_copies(params)
        self.lr, self.weight_decay, self.eps, self.t = lr, weight_decay, eps, 0
        self.row = {n: np.zeros(p.shape[:1]) for n, p in self.params.items() if p.ndim > 1}
        self.column = {n: np.zeros(p.shape[1:]) for n, p in self.params.items() if p.ndim > 1}
        self.v = {n: np.zeros_like(p) for n, p in self.params.items()}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        self.t += 1
        fresh = self.t**-0.8
        for n, g in float64_copies(grads).items():
            p = self.params[n]
            size = max(1e-3, float(np.sqrt(np.mean(p * p))))
            p *= 1 - self.lr * self.weight_decay
            if g.ndim > 1:
                self.row[n] += fresh * ((g * g).mean(1) - self.row[n])
                self.column[n] += fresh * ((g * g).mean(0) - self.column[n])
                v = np.outer(self.row[n], self.column[n]) / max(self.row[n].mean(), self.eps)
            else:
                v = self.v[n] = self.v[n] + fresh * (g * g - self.v[n])
            u = g / np.sqrt(np.maximum(v, self.eps**2))
            u /= max(1.0, float(np.sqrt(np.mean(u * u))))
            p -= min(self.lr, self.t**-0.5) * size * u
