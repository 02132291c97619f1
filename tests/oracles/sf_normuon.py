"""SF-NorMuon, arXiv 2605.23061 Algorithm 1 (no official code was found; two second-hand sources agree).

    m = mu m + (1 - mu) g   (EMA, no Nesterov);   P = NS(m);   v_i = b2 v_i + (1 - b2) mean_j P_ij^2
    Phat = P / (sqrt(v) + eps);   lr_t = lr min(1, t / warmup);   eta_hat = 0.2 lr_t sqrt(r c) / ||Phat||
    z = z - lr_t wd z - eta_hat Phat
    c = lr_t^2 / sum(lr_t^2);   x = (1 - c) x + c z;   y = b1 x + (1 - b1) z

The other tensors: Schedule-Free AdamW with decay at z, the same lr, b1 and decay. A zero Phat moves nothing but decay.
One source decays by the base lr, the other by lr_t: here lr_t. The default `weight_by="lr_max"` weighs by the largest
lr so far, as schedulefree does, and is the equation above until the lr falls; `weight_by="lr"` is the equation always.
"""

import math
from collections.abc import Collection

import numpy as np

from tests.oracles.muon import as_matrix
from tests.oracles.newton_schulz import JORDAN, Coefficients, newton_schulz
from tests.oracles.protocol import Given, Tensors, float64_copies
from tests.oracles.schedule_free import WeightBy
from tests.oracles.sf_adamw import SFAdamW


class SFNorMuon:
    """SF-NorMuon on the names in `spectral`; SFAdamW on the others (`.scalar`), which follows this lr."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        lr: float = 0.008,
        b1: float = 0.9,
        momentum: float = 0.8,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
        weight_by: WeightBy = "lr_max",
        coefficients: Coefficients = JORDAN,
        n_steps: int = 5,
        scalar_beta2: float = 0.999,
        scalar_eps: float = 1e-8,
        scalar_weight_decay: float | None = None,
    ) -> None:
        self.names, self.spectral = tuple(params), tuple(spectral)
        self.x, self.y, self.z = (float64_copies({n: params[n] for n in self.spectral}) for _ in range(3))
        self.m = {name: np.zeros_like(z) for name, z in self.z.items()}
        self.v = {name: np.zeros((z.shape[0], 1)) for name, z in self.z.items()}
        self.scalar = SFAdamW(
            {n: p for n, p in params.items() if n not in self.spectral},
            lr=lr,
            betas=(b1, scalar_beta2),
            eps=scalar_eps,
            weight_decay=weight_decay if scalar_weight_decay is None else scalar_weight_decay,
            decay_at="z",
            warmup_steps=warmup_steps,
            weight_by=weight_by,
        )
        self.lr, self.b1, self.momentum, self.beta2, self.eps = lr, b1, momentum, beta2, eps
        self.weight_decay, self.warmup_steps = weight_decay, warmup_steps
        self.weight_by: WeightBy = weight_by
        self.coefficients, self.n_steps = coefficients, n_steps
        self.t = 0
        self.lr_max = self.weight_sum = 0.0

    def gradient_point(self) -> Tensors:
        y = float64_copies(self.y) | self.scalar.gradient_point()
        return {name: y[name] for name in self.names}

    def weights(self) -> Tensors:
        x = float64_copies(self.x) | self.scalar.weights()
        return {name: x[name] for name in self.names}

    def step(self, grads: Given) -> None:
        self.scalar.lr = self.lr
        self.scalar.step({name: grads[name] for name in self.scalar.z})
        self.t += 1
        lr = self.lr * (self.t / self.warmup_steps if self.t < self.warmup_steps else 1.0)
        self.lr_max = max(self.lr_max, lr)
        weight = self.lr_max**2 if self.weight_by == "lr_max" else lr**2
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum > 0 else 0.0
        g = float64_copies(grads)
        for name, z in self.z.items():
            self.m[name] = self.momentum * self.m[name] + (1 - self.momentum) * g[name]
            polar = newton_schulz(as_matrix(self.m[name]), self.coefficients, self.n_steps)
            self.v[name] = self.beta2 * self.v[name] + (1 - self.beta2) * np.mean(polar**2, axis=1, keepdims=True)
            p_hat = polar / (np.sqrt(self.v[name]) + self.eps)
            norm = float(np.linalg.norm(p_hat))
            eta_hat = 0.2 * lr * math.sqrt(p_hat.size) / norm if norm > 0 else 0.0
            z *= 1 - lr * self.weight_decay
            z -= eta_hat * p_hat.reshape(z.shape)
            self.x[name] = (1 - c) * self.x[name] + c * z
            self.y[name] = self.b1 * self.x[name] + (1 - self.b1) * z
