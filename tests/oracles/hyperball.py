"""Hyperball, arXiv 2606.16899: every matrix stays on the sphere of its initial norm.

    Norm(X) = X / ||X||;    R = ||W_0||;    W = R Norm(W - lr R Norm(u))

u is any direction, here by default the gradient itself. No weight decay. Where R = 0 the plain step, W -= lr u, as
FusionOpt's later revision does.
"""

from collections.abc import Callable

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


class Hyperball:
    """lr: the relative step, about the angle by which W turns. Every name is one matrix."""

    def __init__(
        self, params: Given, *, lr: float = 0.02, direction: Callable[[Tensors], Tensors] = float64_copies
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.direction = lr, direction
        self.radius = {name: float(np.linalg.norm(p)) for name, p in self.params.items()}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        for name, u in self.direction(float64_copies(grads)).items():
            w, r = self.params[name], self.radius[name]
            if r == 0:
                w -= self.lr * u
            elif np.linalg.norm(u) > 0:
                tilde = w - self.lr * r * u / np.linalg.norm(u)
                w[...] = r * tilde / np.linalg.norm(tilde)
