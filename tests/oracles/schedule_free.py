"""Schedule-Free around any base step, arXiv 2405.15682, with x, y and z kept as three separate sets of arrays.

    g is taken at y;   z -= lr wd_y y;   z = base step from z with g (the base's own decay acts at z)
    lr_max = max(lr_max, lr);   w = lr_max^2;   c = w / sum(w)  (1 at the first update; 0 while all w are 0)
    x = (1 - c) x + c z;   y = momentum x + (1 - momentum) z

Source: schedulefree 1.4.1 `ScheduleFreeWrapper`, which keeps y and z only and reads the lr before the base's schedule.
`weight_by="lr"` weighs by this update's lr^2 instead (SF-NorMuon's paper): it differs only once the lr has fallen.
"""

from collections.abc import Callable
from typing import Literal

from tests.oracles.protocol import BaseOracle, Given, Tensors, float64_copies

WeightBy = Literal["lr_max", "lr"]


class ScheduleFree:
    """`ScheduleFree(params, lambda p: Muon(p, spectral=(...), lr=0.02))`: the base's `params` are z, its `lr` the lr.

    One c for all tensors, from the base's `lr`: a base's `.scalar` with another lr is averaged with the same weights.
    """

    def __init__(
        self,
        params: Given,
        base: Callable[[Tensors], BaseOracle],
        *,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        weight_by: WeightBy = "lr_max",
    ) -> None:
        self.base = base(float64_copies(params))
        self.momentum, self.weight_decay_at_y = momentum, weight_decay_at_y
        self.weight_by: WeightBy = weight_by
        self.x, self.y, self.z = float64_copies(params), float64_copies(params), self.base.params
        self.lr_max = self.weight_sum = 0.0

    @property
    def lr(self) -> float:
        return self.base.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.base.lr = value

    def gradient_point(self) -> Tensors:
        return float64_copies(self.y)

    def weights(self) -> Tensors:
        return float64_copies(self.x)

    def step(self, grads: Given) -> None:
        for name, z in self.z.items():
            z -= self.lr * self.weight_decay_at_y * self.y[name]
        self.base.step(grads)
        self.lr_max = max(self.lr_max, self.lr)
        weight = self.lr_max**2 if self.weight_by == "lr_max" else self.lr**2
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum > 0 else 0.0
        for name, z in self.z.items():
            self.x[name] = (1 - c) * self.x[name] + c * z
            self.y[name] = self.momentum * self.x[name] + (1 - self.momentum) * z
