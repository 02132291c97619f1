"""Small problems with known answers, in float64, for the slow twins and for what they judge."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from tests.data.bowl import SHAPES, Bowl, noise
from tests.oracles.protocol import Oracle, Tensors, float64_copies


class BowlGradient:
    """The Bowl's gradient from its formula, h (p - t) + n, in float64; `start` are its initial weights."""

    def __init__(self) -> None:
        bowl = Bowl()
        self.start = float64_copies({name: getattr(bowl, name) for name in SHAPES})
        self._minimum = float64_copies({name: getattr(bowl, "t_" + name) for name in SHAPES})
        self._curvature = float64_copies({name: getattr(bowl, "h_" + name) for name in SHAPES})

    def __call__(self, point: Tensors, update: int) -> Tensors:
        """The gradient of update 1, 2, ... at `point` (some or all of the tensors)."""
        n = _noise(update)
        return {name: self._curvature[name] * (p - self._minimum[name]) + n[name] for name, p in point.items()}


def run_oracle(oracle: Oracle, updates: Iterable[int], each: Callable[[int], None] = lambda update: None) -> None:
    """Runs a twin on the Bowl; `each(update)` is called before every update (to set its lr)."""
    gradient = BowlGradient()
    for update in updates:
        each(update)
        oracle.step(gradient(oracle.gradient_point(), update))


def run_torch(
    params: dict[str, Tensor], step: Callable[[], object], updates: Iterable[int], each: Callable[[int], None]
) -> None:
    """Runs a torch optimizer on the Bowl: `params` (float64 leaves) get the formula's gradient, then `step()`."""
    gradient = BowlGradient()
    for update in updates:
        each(update)
        for name, g in gradient(float64_copies(params), update).items():
            params[name].grad = torch.from_numpy(g)
        step()


@lru_cache(maxsize=128)
def _noise(update: int) -> Tensors:
    return float64_copies(dict(zip(SHAPES, noise(update - 1), strict=True)))
