"""Moving averages of weights in float64, step by step as their sources write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def diffusers_decay(
    step: int, decay: float, warmup: str, inv_gamma: float, power: float, least: float, after: int
) -> float:
    """``EMAModel.get_decay`` with ``optimization_step = step``."""
    s = max(0, step - after - 1)
    if s <= 0:
        return 0.0
    bound = 1 - (1 + s / inv_gamma) ** -power if warmup == "power" else (1 + s) / (10 + s)
    return max(min(bound, decay), least)


def profile_decay(step: int, gamma: float) -> float:
    """EDM2's β of equation 127."""
    return (1 - 1 / step) ** (gamma + 1)


def averages(start: Array, weights: Iterable[Array], decays: Iterable[float | None]) -> Iterator[Array]:
    """The average after each step; a decay of None leaves it."""
    average = start.astype(np.float64)
    for w, decay in zip(weights, decays, strict=True):
        if decay is not None:
            average = decay * average + (1 - decay) * w
        yield average
