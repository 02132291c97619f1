"""Dynamic loss scaling: small gradients of fp16 are lifted above the least number that it has, inside the program."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._types import Tensors

SCALE, SINCE = keys.counts("loss_scale"), keys.counts("steps_since_overflow")


@dataclass(frozen=True)
class LossScale:
    """How the scale of an fp16 loss moves: ``torch.amp.GradScaler``'s rule, with a least scale.

    The loss is multiplied by the scale before its backward, and the gradients are divided by it. A step whose gradient
    is not finite is skipped, and the scale shrinks. After `interval` steps in a row without one it grows. All of it
    happens on the device. The scale is ``step.metrics["loss_scale"]``, and part of a checkpoint.

    Args:
        initial: The first scale.
        growth: What the scale is multiplied by when it grows; above 1. A scale that would be infinite does not grow.
        backoff: What it is multiplied by after an overflow; between 0 and 1.
        interval: Steps without an overflow before it grows.
        floor: The least scale, so that a model that has diverged does not drive it to 0.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model, loss_fn = torch.nn.Linear(4, 2), lambda model, x: model(x).square().mean()
        >>> scale = fc.LossScale(initial=2.0**10, interval=500)
        >>> step = fc.compile_training_step(
        ...     model, loss_fn, compute_dtype=torch.float16, loss_scale=scale, mode="eager"
        ... )
        >>> loss = step(torch.randn(8, 4))
        >>> float(step.metrics["loss_scale"])
        1024.0
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 2.0**-14

    def __post_init__(self) -> None:
        if not 1 < self.growth < math.inf or not 0 < self.backoff < 1:
            raise ValueError(
                f"LossScale(growth={self.growth}, backoff={self.backoff}): growth must be above 1, and backoff between "
                f"0 and 1."
            )
        if not 0 < self.floor <= self.initial < math.inf:
            raise ValueError(
                f"LossScale(initial={self.initial}, floor={self.floor}): use finite numbers above 0, floor at most "
                f"initial."
            )
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"LossScale(interval={self.interval!r}) is not a number of steps; give at least 1.")


def start(rule: LossScale, device: torch.device) -> Tensors:
    """The entries of the flat state: the scale, fp32, and the steps since it last moved, int64."""
    since = torch.zeros((), dtype=torch.int64, device=device)
    return {SCALE: torch.full((), rule.initial, dtype=torch.float32, device=device), SINCE: since}


def moved(rule: LossScale, state: Tensors, norm: Tensor) -> Tensors:
    """The entries after a step whose unscaled gradient has the global norm `norm`."""
    scale, since = state[SCALE], state[SINCE] + 1
    grown = scale * rule.growth
    due = since == rule.interval
    up = torch.where(due & grown.isfinite(), grown, scale)
    down = (scale * rule.backoff).clamp(min=rule.floor)
    finite = norm.isfinite()
    kept = torch.where(due | ~finite, torch.zeros_like(since), since)
    return {SCALE: torch.where(finite, up, down), SINCE: kept}


def scale_of(given: LossScale | bool | None, dtypes: Collection[torch.dtype | None]) -> LossScale | None:
    """What ``loss_scale=`` means for a step whose weights and products have `dtypes`."""
    if isinstance(given, LossScale):
        return given
    if given is None and torch.float16 not in dtypes:
        return None
    return None if given is False else LossScale()


def scaled(value: Tensor, state: Tensors) -> Tensor:
    """The loss times the state's scale, in fp32 at least; itself without a scale."""
    return value * state[SCALE] if SCALE in state else value


def unscaled(gradients: Tensors, state: Tensors) -> Tensors:
    """The gradients divided by the state's scale."""
    if SCALE not in state:
        return gradients
    # In fp64, as torch.amp.GradScaler: the reciprocal of a subnormal scale is infinite in fp32.
    inverse = state[SCALE].double().reciprocal()
    return {name: g * inverse.to(g.dtype) for name, g in gradients.items()}
