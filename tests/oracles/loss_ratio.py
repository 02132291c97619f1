"""FusionOpt's step size around any twin (Taikakim/fusion-optimiser 3e58fe7, `gamma_t`).

a = sum |g| / number of elements, over all tensors;   G = a at first, then beta G + (1 - beta) a
L likewise from the loss;   ratio = clamp(L / (G + 1e-12), low, high), 1 before the first loss
one step of the twin with its lr times ratio
"""

import numpy as np

from tests.oracles.protocol import Given, Oracle, Tensors, float64_copies


class LossRatio:
    """`LossRatio(AdamW(params, lr=1e-3))`: `lr` is the unscaled one, `rate` the scaled one of the last update."""

    def __init__(self, base: Oracle, *, beta: float = 0.98, minimum: float = 0.1, maximum: float = 10.0) -> None:
        self.base, self.lr = base, base.lr
        self.beta, self.minimum, self.maximum = beta, minimum, maximum
        self.loss_ema: float | None = None
        self.gnorm_ema: float | None = None
        self.rate = 0.0

    def gradient_point(self) -> Tensors:
        return self.base.gradient_point()

    def weights(self) -> Tensors:
        return self.base.weights()

    def step(self, grads: Given, loss: float | None = None) -> None:
        g = float64_copies(grads)
        a = sum(float(np.abs(t).sum()) for t in g.values()) / sum(t.size for t in g.values())
        self.gnorm_ema = a if self.gnorm_ema is None else self.beta * self.gnorm_ema + (1 - self.beta) * a
        if loss is not None:
            self.loss_ema = loss if self.loss_ema is None else self.beta * self.loss_ema + (1 - self.beta) * loss
        ratio = 1.0
        if self.loss_ema is not None:
            ratio = min(max(self.loss_ema / (self.gnorm_ema + 1e-12), self.minimum), self.maximum)
        self.base.lr = self.rate = self.lr * ratio
        self.base.step(g)
