"""Schedule-Free AdamW, arXiv 2405.15682 Algorithm 1, with x, y and z kept as three separate sets of arrays.

    lr_t = lr min(1, t / warmup);   v = b2 v + (1 - b2) g^2;   u = g / (sqrt(v / (1 - b2^t)) + eps)
    z = z - lr_t (u + wd y)   (decay "y", the official default)   or   z - lr_t (u + wd z)   (decay "z")
    lr_max = max(lr_max, lr_t);   c = lr_max^2 / sum(lr_max^2)
    x = (1 - c) x + c z;   y = b1 x + (1 - b1) z

There is no first moment: b1 only places y. Source: schedulefree 1.4.1 `adamw_schedulefree.py`, which keeps only y, z.
`weight_by="lr"` weighs by lr_t^2 instead: it differs only once the lr has fallen.
"""

from typing import Literal

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies
from tests.oracles.schedule_free import WeightBy


class SFAdamW:
    """Element by element, so no name is treated differently."""

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_at: Literal["y", "z"] = "y",
        warmup_steps: int = 0,
        weight_by: WeightBy = "lr_max",
    ) -> None:
        self.x, self.y, self.z = (float64_copies(params) for _ in range(3))
        self.v = {name: np.zeros_like(p) for name, p in self.z.items()}
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.decay_at: Literal["y", "z"] = decay_at
        self.warmup_steps = warmup_steps
        self.weight_by: WeightBy = weight_by
        self.t = 0
        self.lr_max = self.weight_sum = 0.0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.y)

    def weights(self) -> Tensors:
        return float64_copies(self.x)

    def step(self, grads: Given) -> None:
        self.t += 1
        b1, b2 = self.betas
        lr = self.lr * (self.t / self.warmup_steps if self.t < self.warmup_steps else 1.0)
        self.lr_max = max(self.lr_max, lr)
        weight = self.lr_max**2 if self.weight_by == "lr_max" else lr**2
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum > 0 else 0.0
        g = float64_copies(grads)
        for name, z in self.z.items():
            self.v[name] = b2 * self.v[name] + (1 - b2) * g[name] ** 2
            u = g[name] / (np.sqrt(self.v[name] / (1 - b2**self.t)) + self.eps)
            decayed = self.y[name] if self.decay_at == "y" else z
            z -= lr * (u + self.weight_decay * decayed)
            self.x[name] = (1 - c) * self.x[name] + c * z
            self.y[name] = b1 * self.x[name] + (1 - b1) * z
