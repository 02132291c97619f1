"""ScheduleFree+ over Adam, arXiv 2605.19095, with x, y and z kept as three separate sets of arrays; k counts from 0.

    beta_k = 1 - exp((1 - p) ln(1 - beta) + p ln(1 - beta_max)),   p = min(k / anneal, 1)   (beta without anneal)
    e = pb e + (1 - pb) sqrt(pi/2) sum |g|;   polyak = max(0, f + beta_k sum g (z - x)) / (e / (1 - pb^(k+1)))
    lr_k = lr polyak;   z = z - lr_k^2 wd y;   z = z - lr_k Adam(g);   lr_max = max(lr_max, lr_k)
    c = 1 while k < c_warmup, else w / sum(w) over k >= c_warmup, w = (k + 1)^r lr_max^power
    x = (1 - c) x + c z;   y = beta_k x + (1 - beta_k) z

f is the loss at y. All sums run over all tensors together. Source: schedule_free `adamc_schedulefree_plus_paper.py` at
70785b5, which corrects an already corrected e when pb > 0, floors lr and lr_max at 1e-8, and has no answer to g = 0;
here e is corrected once, nothing is floored, and lr_k = 0 at g = 0.
"""

import math

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


def annealed_beta(k: int, beta: float, beta_max: float, anneal: int) -> float:
    """beta_k."""
    if anneal == 0:
        return beta
    p = min(k / anneal, 1.0)
    return 1 - math.exp((1 - p) * math.log(1 - beta) + p * math.log(1 - beta_max))


class ScheduleFreePlus:
    """Element by element but for the one step size, so no name is treated differently. `step` needs the loss too.

    `lr` is the factor, 1 by default; `lr_k`, `inner` and `grad_l1` are those of the last update.
    """

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        beta: float = 0.9,
        beta_max: float = 0.965,
        anneal: int = 0,
        c_warmup: int = 0,
        weight_decay: float = 0.0,
        polyak_beta: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        self.x, self.y, self.z = (float64_copies(params) for _ in range(3))
        self.m = {name: np.zeros_like(z) for name, z in self.z.items()}
        self.v = {name: np.zeros_like(z) for name, z in self.z.items()}
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.beta, self.beta_max, self.anneal, self.c_warmup = beta, beta_max, anneal, c_warmup
        self.polyak_beta, self.r, self.weight_lr_power = polyak_beta, r, weight_lr_power
        self.k = 0
        self.e = self.lr_max = self.weight_sum = self.lr_k = self.inner = self.grad_l1 = 0.0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.y)

    def weights(self) -> Tensors:
        return float64_copies(self.x)

    def step(self, grads: Given, loss: float) -> None:
        g = float64_copies(grads)
        beta_k = annealed_beta(self.k, self.beta, self.beta_max, self.anneal)
        self.grad_l1 = sum(float(np.abs(t).sum()) for t in g.values())
        self.inner = beta_k * sum(float((g[n] * (z - self.x[n])).sum()) for n, z in self.z.items())
        self.e = self.polyak_beta * self.e + (1 - self.polyak_beta) * math.sqrt(math.pi / 2) * self.grad_l1
        corrected = self.e / (1 - self.polyak_beta ** (self.k + 1))
        self.lr_k = self.lr * max(0.0, loss + self.inner) / corrected if corrected > 0 else 0.0
        self.lr_max = max(self.lr_max, self.lr_k)
        c = 1.0
        if self.k >= self.c_warmup:
            weight = (self.k + 1) ** self.r * self.lr_max**self.weight_lr_power
            self.weight_sum += weight
            c = weight / self.weight_sum if self.weight_sum > 0 else 0.0
        b1, b2 = self.betas
        for n, z in self.z.items():
            z -= self.lr_k**2 * self.weight_decay * self.y[n]
            self.m[n] = b1 * self.m[n] + (1 - b1) * g[n]
            self.v[n] = b2 * self.v[n] + (1 - b2) * g[n] ** 2
            m_hat, v_hat = self.m[n] / (1 - b1 ** (self.k + 1)), self.v[n] / (1 - b2 ** (self.k + 1))
            z -= self.lr_k * m_hat / (np.sqrt(v_hat) + self.eps)
            self.x[n] = (1 - c) * self.x[n] + c * z
            self.y[n] = beta_k * self.x[n] + (1 - beta_k) * z
        self.k += 1
