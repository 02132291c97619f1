"""Cautious updates, arXiv 2411.16085, and cautious weight decay, arXiv 2510.12402.

mask = 1[u g > 0], for each parameter by itself, n entries of which k agree;    p -= lr factor mask u
"mean": 1 / max(k / n, floor) (c_adamw.py, c_muon.py);   "count_plus_one": n / (k + 1) (paper, c_lion.py)
"norm": ||u|| / (||mask u|| + 1e-8) (FusionOpt);         "none": 1

decay:  p -= lr (u + wd 1[u p >= 0] p), u being the final direction
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from tests.oracles.protocol import Array, Given, Tensors, float64_copies

Rescale = Literal["mean", "norm", "count_plus_one", "none"]


def cautious(u: Array, g: Array, rescale: Rescale = "mean", floor: float = 1e-3) -> Array:
    """One parameter's direction `u` masked by its gradient `g`, and rescaled."""
    mask = (u * g > 0).astype(np.float64)
    n, k = mask.size, float(mask.sum())
    if rescale == "mean":
        factor = 1 / max(k / n, floor)
    elif rescale == "count_plus_one":
        factor = n / (k + 1)
    elif rescale == "norm":
        factor = float(np.linalg.norm(u)) / (float(np.linalg.norm(mask * u)) + 1e-8)
    else:
        factor = 1.0
    return factor * mask * u


class Cautious:
    """`direction(grads)` gives u of the base (a twin's method). `weight_decay`: cautious. `keep_frac`: of the last
    step, over all entries."""

    def __init__(
        self,
        params: Given,
        direction: Callable[[Given], Tensors],
        *,
        lr: float,
        rescale: Rescale = "mean",
        floor: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = float64_copies(params)
        self.lr, self.direction, self.floor, self.weight_decay = lr, direction, floor, weight_decay
        self.rescale: Rescale = rescale
        self.keep_frac = 0.0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.params)

    def weights(self) -> Tensors:
        return float64_copies(self.params)

    def step(self, grads: Given) -> None:
        g = float64_copies(grads)
        kept = 0
        for name, u in self.direction(g).items():
            p = self.params[name]
            kept += int((u * g[name] > 0).sum())
            u = cautious(u, g[name], self.rescale, self.floor)
            p -= self.lr * (u + self.weight_decay * (u * p >= 0) * p)
        self.keep_frac = kept / sum(p.size for p in self.params.values())
