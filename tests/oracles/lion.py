"""Lion, arXiv 2302.06675 Algorithm 2.

u = sign(b1 m + (1 - b1) g);    p = (1 - lr wd) p - lr u;    m = b2 m + (1 - b2) g
"""

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


class Lion:
    """`direction(grads)` is u, and moves m; `step` takes it. Element by element. lr: the step of one entry."""

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.m = {name: np.zeros_like(p) for name, p in self.params.items()}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def direction(self, grads: Given) -> Tensors:
        b1, b2 = self.betas
        signs = {}
        for name, g in float64_copies(grads).items():
            signs[name] = np.sign(b1 * self.m[name] + (1 - b1) * g)
            self.m[name] = b2 * self.m[name] + (1 - b2) * g
        return signs

    def step(self, grads: Given) -> None:
        for name, u in self.direction(grads).items():
            p = self.params[name]
            p *= 1 - self.lr * self.weight_decay
            p -= self.lr * u
