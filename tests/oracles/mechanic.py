"""Mechanic, arXiv 2306.00144 algorithm 2, around any twin whose updates are u.

D = sum of u;  h = <D, g> + decay S |g| / |p| <D, p>;  for each b: m = max(b m, |h|), v = b^2 v + h^2,
r = max(0, b r - s h), s = (s0 m / n + r) / (sqrt v + e);  S = sum of s;  p = p0 + S D      (D with the new u)
Autokaon: s0 = 0.003 rms(p0), S within [0.5 max S, 6 s0], and S is kept after 50 updates near its largest
"""

import numpy as np

from tests.oracles.protocol import BaseOracle, Given, Tensors, float64_copies


class Mechanic:
    """`base` starts at the same weights, and is put back to them before each of its steps."""

    def __init__(
        self,
        base: BaseOracle,
        *,
        s_init: float = 1e-6,
        decay: float = 1e-2,
        eps: float = 1e-8,
        relative: bool = False,
        bounds: tuple[float, float] = (0.0, np.inf),
        freeze: bool = False,
    ) -> None:
        self.base, self.s_init, self.decay, self.eps = base, s_init, decay, eps
        self.lr, self.bounds, self.freeze = base.lr, bounds, freeze
        if relative:
            flat = np.concatenate([p.ravel() for p in base.params.values()])
            self.s_init *= float(np.sqrt(np.mean(flat**2)))
        self.scale, self.highest, self.calm = 0.0, 0.0, 0
        self.params, self.start = float64_copies(base.params), float64_copies(base.params)
        self.betas = 1 - 10.0 ** -np.arange(1, 7)
        self.m, self.v, self.r, self.s = (np.zeros(6) for _ in range(4))

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        for n, p in self.params.items():
            self.base.params[n][...] = p
        self.base.step(g)
        u = {n: self.base.params[n] - p for n, p in self.params.items()}
        scale = self.scale
        if self.freeze and self.calm >= 50:
            for n in g:
                self.params[n] = self.params[n] + scale * u[n]
            return
        delta = {n: (p - self.start[n]) / (scale + self.eps) for n, p in self.params.items()}
        norm, size = (np.sqrt(sum(float((t * t).sum()) for t in ts.values())) for ts in (g, self.params))
        pull = self.decay * scale * norm / (size + self.eps)
        h = sum(float((delta[n] * (g[n] + pull * self.params[n])).sum()) for n in g)
        self.m = np.maximum(self.betas * self.m, abs(h))
        self.v = self.betas**2 * self.v + h * h
        self.r = np.maximum(0, self.betas * self.r - self.s * h)
        first = self.s_init / 6 if scale == 0 else 0.0
        self.s = (self.s_init * self.m / 6 + self.r) / (np.sqrt(self.v) + self.eps) + first
        lowest, most = self.bounds
        self.scale = max(min(float(self.s.sum()), most * self.s_init), lowest * self.highest)
        near = abs(self.scale - scale) < 0.02 * scale and self.scale >= 0.9 * self.highest
        self.calm, self.highest = self.calm + 1 if near else 0, max(self.highest, self.scale)
        for n in g:
            self.params[n] = self.start[n] + self.scale * (delta[n] + u[n])
