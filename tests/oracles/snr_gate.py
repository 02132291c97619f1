"""FusionOpt's SNR gate (no paper): rows or entries whose source is noise move less.

    M = b M + (1 - b) s;   V = b V + (1 - b) sum_j s_ij^2;   both / (1 - b^t)      (entry: no sum)
    gain = max(floor, min(1, ||M_i|| / sqrt(max(V_i, 1e-30)))^power);   p -= lr gain u

s is the gradient g or the direction u. Source: FusionOpt `snr_gate`.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from tests.oracles.protocol import Given, Tensors, float64_copies


class SnrGate:
    """`direction(grads)` gives u of the base (a twin's method; by default g). `gain`: the last step's mean."""

    def __init__(
        self,
        params: Given,
        direction: Callable[[Given], Tensors] = float64_copies,
        *,
        lr: float,
        beta: float = 0.9,
        mode: Literal["row", "element"] = "row",
        source: Literal["gradient", "update"] = "gradient",
        floor: float = 0.0,
        power: float = 1.0,
    ) -> None:
        self.params = float64_copies(params)
        self.direction, self.lr, self.beta, self.floor, self.power = direction, lr, beta, floor, power
        self.mode, self.source = mode, source
        self.mean = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.square = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.t = 0
        self.gain = 0.0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        self.t += 1
        g = float64_copies(grads)
        gains = []
        for name, u in self.direction(g).items():
            s = g[name] if self.source == "gradient" else u
            self.mean[name] = self.beta * self.mean[name] + (1 - self.beta) * s
            self.square[name] = self.beta * self.square[name] + (1 - self.beta) * s**2
            m = self.mean[name] / (1 - self.beta**self.t)
            v = self.square[name] / (1 - self.beta**self.t)
            if self.mode == "row":
                signal = np.linalg.norm(m, axis=-1, keepdims=True)
                noise = np.sqrt(np.maximum(v.sum(-1, keepdims=True), 1e-30))
            else:
                signal, noise = np.abs(m), np.sqrt(np.maximum(v, 1e-30))
            gain = np.maximum(np.minimum(signal / noise, 1.0) ** self.power, self.floor)
            self.params[name] -= self.lr * gain * u
            gains.append(gain.ravel())
        self.gain = float(np.concatenate(gains).mean())
