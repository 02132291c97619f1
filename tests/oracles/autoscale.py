"""Prodigy (arXiv 2306.06101) as its authors wrote it, and its estimate of the distance around any twin.

Prodigy (konstmish/prodigy 3efb213 = PyPI prodigyopt 1.1.2), k from 0, all sums over all tensors together:

    bias = sqrt(1 - b2^(k+1)) / (1 - b1^(k+1))  or 1;   dlr = d lr bias;   b3 = sqrt(b2)
    N = b3 N + (d / d0) dlr sum g (p0 - p);   s = b3 s + (d / d0) (d if safeguard else dlr) g
    m = b1 m + (1 - b1) d g;   v = b2 v + (1 - b2) d^2 g^2
    dhat = coef N / sum |s|;   if d = d0: d = max(d, dhat);   d_max = max(d_max, dhat);   d = min(d_max, growth d)
    p = p - dlr m / (sqrt(v) + d eps)       (dlr from before, d from after; with b1 = 0 dlr d g for dlr m, d from after)

The estimate alone, in front of a twin: l = d^2 / d0 for both weights, no exception at d = d0, and the twin's lr times
d / d0 with the d from before. It is kept for the entries at places 0, q, 2q, ... of each matrix (of each tensor that is
not one): q is `strides[name]`.
"""

import math
from collections.abc import Mapping

import numpy as np

from tests.oracles.protocol import Given, Oracle, Tensors, float64_copies


class Prodigy:
    """Element by element but for d, so no name is treated differently. No weight decay."""

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        d0: float = 1e-6,
        coefficient: float = 1.0,
        growth: float = math.inf,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
    ) -> None:
        self.params, self.p0 = float64_copies(params), float64_copies(params)
        self.m, self.v, self.s = ({n: np.zeros_like(p) for n, p in self.params.items()} for _ in range(3))
        self.lr, self.betas, self.eps, self.coefficient, self.growth = lr, betas, eps, coefficient, growth
        self.use_bias_correction, self.safeguard_warmup = use_bias_correction, safeguard_warmup
        self.d0 = self.d = self.d_max = d0
        self.numerator, self.k = 0.0, 0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g, d, (b1, b2) = float64_copies(grads), self.d, self.betas
        b3 = math.sqrt(b2)
        bias = math.sqrt(1 - b2 ** (self.k + 1)) / (1 - b1 ** (self.k + 1)) if self.use_bias_correction else 1.0
        dlr = d * self.lr * bias
        self.numerator *= b3
        for n, p in self.params.items():
            self.numerator += d / self.d0 * dlr * float((g[n] * (self.p0[n] - p)).sum())
            self.m[n] = b1 * self.m[n] + (1 - b1) * d * g[n]
            self.v[n] = b2 * self.v[n] + (1 - b2) * d**2 * g[n] ** 2
            self.s[n] = b3 * self.s[n] + d / self.d0 * (d if self.safeguard_warmup else dlr) * g[n]
        norm = sum(float(np.abs(s).sum()) for s in self.s.values())
        if norm == 0:
            return
        estimate = self.coefficient * self.numerator / norm
        if d == self.d0:
            d = max(d, estimate)
        self.d_max = max(self.d_max, estimate)
        self.d = min(self.d_max, d * self.growth)
        for n, p in self.params.items():
            m = self.m[n] if b1 > 0 else self.d * g[n]
            p -= dlr * m / (np.sqrt(self.v[n]) + self.d * self.eps)
        self.k += 1


class Autoscale:
    """`Autoscale(AdamW(params, lr=1e-3), d0=1e-3)`: `lr` is the unscaled one, `multiplier` that of the last update.

    The estimate is taken at the twin's `gradient_point()`. `strides`: 1 where a name is not in it.
    """

    def __init__(
        self,
        base: Oracle,
        *,
        d0: float,
        growth: float = 1.02,
        beta3: float = math.sqrt(0.999),
        coefficient: float = 1.0,
        strides: Mapping[str, int] | None = None,
    ) -> None:
        self.base, self.lr = base, base.lr
        self.growth, self.beta3, self.coefficient, self.strides = growth, beta3, coefficient, dict(strides or {})
        self.p0 = self._sampled(base.gradient_point())
        self.s = {n: np.zeros_like(p) for n, p in self.p0.items()}
        self.d0 = self.d = self.d_max = d0
        self.numerator, self.multiplier = 0.0, 1.0

    def _sampled(self, tensors: Tensors) -> Tensors:
        return {n: t.ravel()[:: self.strides.get(n, 1)] for n, t in tensors.items()}

    def gradient_point(self) -> Tensors:
        return self.base.gradient_point()

    def weights(self) -> Tensors:
        return self.base.weights()

    def step(self, grads: Given) -> None:
        g, p = self._sampled(float64_copies(grads)), self._sampled(self.base.gradient_point())
        weight = self.d**2 / self.d0
        self.multiplier = self.d / self.d0
        self.numerator *= self.beta3
        for n in self.s:
            self.numerator += weight * float((g[n] * (self.p0[n] - p[n])).sum())
            self.s[n] = self.beta3 * self.s[n] + weight * g[n]
        norm = sum(float(np.abs(s).sum()) for s in self.s.values())
        estimate = self.coefficient * self.numerator / norm if norm > 0 else 0.0
        self.d_max = max(self.d_max, estimate)
        self.d = min(self.d_max, self.growth * self.d)
        self.base.lr = self.lr * self.multiplier
        self.base.step(grads)
