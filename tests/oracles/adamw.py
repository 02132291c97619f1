"""AdamW, arXiv 1711.05101 Algorithm 2, with torch.optim.AdamW's placement of decay and eps.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

t counts updates from 1; the decay is decoupled, and scaled by the same lr as the step.
"""

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


class AdamW:
    """Element by element, so no name is treated differently. lr: about the rms of one update."""

    def __init__(
        self,
        params: Given,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t = 0
        self.m = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.params.items()}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        self.t += 1
        b1, b2 = self.betas
        g = float64_copies(grads)
        for name, p in self.params.items():
            self.m[name] = b1 * self.m[name] + (1 - b1) * g[name]
            self.v[name] = b2 * self.v[name] + (1 - b2) * g[name] ** 2
            m_hat = self.m[name] / (1 - b1**self.t)
            v_hat = self.v[name] / (1 - b2**self.t)
            p *= 1 - self.lr * self.weight_decay
            p -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
