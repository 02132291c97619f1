"""MONA, arXiv 2605.26842, in the form with two buffers, followed by a plain gradient step.

    D = G - G_prev  (0 at the first update);    A = b A + (1 - b) D;    Gt = G + alpha A;    p -= lr Gt

alpha None is the published rule, -1 / (2 (1 - b)). G_prev is the raw gradient, never the augmented one. Source: three
agreeing third-party implementations (the paper's body was not readable).
"""

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


class Mona:
    """`direction(grads)` is Gt; `step` takes it with lr. Any shape. lr: in the unit of the gradient."""

    def __init__(self, params: Given, *, lr: float = 0.02, beta: float = 0.99, alpha: float | None = None) -> None:
        self.params = float64_copies(params)
        self.lr, self.beta = lr, beta
        self.alpha = -1 / (2 * (1 - beta)) if alpha is None else alpha
        self.acceleration = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.previous: Tensors | None = None

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def direction(self, grads: Given) -> Tensors:
        g = float64_copies(grads)
        previous = g if self.previous is None else self.previous
        augmented = {}
        for name in g:
            d = g[name] - previous[name]
            self.acceleration[name] = self.beta * self.acceleration[name] + (1 - self.beta) * d
            augmented[name] = g[name] + self.alpha * self.acceleration[name]
        self.previous = g
        return augmented

    def step(self, grads: Given) -> None:
        for name, u in self.direction(grads).items():
            self.params[name] -= self.lr * u
