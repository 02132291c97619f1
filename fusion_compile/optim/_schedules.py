"""Hyperparameters as functions of the number of steps taken.

A schedule is evaluated on the CPU, from Python's own count of steps, and its value is written into the 0-dim device
tensor that the program reads. Replacing a schedule or its arguments never recompiles, and nothing waits for the device.
Each schedule is a frozen dataclass, so it can be printed, compared and saved in a checkpoint. ``schedule(step)`` takes
the number of steps already taken (0 at the first update).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """Any callable that maps the number of steps already taken to a number.

    Example:
        >>> isinstance(lambda step: 1e-3 / (step + 1), Schedule)
        True
    """

    def __call__(self, step: int) -> float: ...


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def _check(total_steps: int | None, warmup_steps: int, **values: float) -> None:
    for name, value in {"total_steps": total_steps, "warmup_steps": warmup_steps, **values}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} is negative; give 0 for no warm-up.")
    if total_steps is not None and total_steps <= warmup_steps:
        raise ValueError(f"total_steps={total_steps} must be larger than warmup_steps={warmup_steps}.")


@dataclass(frozen=True)
class constant:
    """`value` after a linear warm-up ``value * (step + 1) / warmup_steps`` (schedulefree's form).

    Args:
        value: In the unit of the hyperparameter.
        warmup_steps: 0 for no warm-up.

    Raises:
        ValueError: `warmup_steps` is negative.

    Example:
        >>> from fusion_compile import optim
        >>> schedule = optim.constant(1.0, warmup_steps=4)
        >>> [schedule(step) for step in (0, 1, 3, 100)]
        [0.25, 0.5, 1.0, 1.0]
    """

    value: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check(None, self.warmup_steps, value=self.value)

    def __call__(self, step: int) -> float:
        return self.value * _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class _Decay:
    """Linear warm-up to `peak`, then down to `final` at `total_steps` and beyond, along `_shape`."""

    peak: float
    total_steps: int
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self.total_steps, self.warmup_steps, peak=self.peak, final=self.final)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * _warmup(step, self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (self.peak - self.final) * self._shape(done)

    def _shape(self, done: float) -> float:
        """Share of the way from `final` to `peak` that is left; `done` in [0, 1]."""
        raise NotImplementedError


class cosine(_Decay):
    """Linear warm-up to `peak`, then half a cosine down to `final` at `total_steps` and beyond (1608.03983).

    Args:
        peak: In the unit of the hyperparameter.
        total_steps: More than `warmup_steps`.
        warmup_steps: 0 for no warm-up.
        final: In the unit of the hyperparameter.

    Raises:
        ValueError: The warm-up is negative or leaves no step for the decay.

    Example:
        >>> from fusion_compile import optim
        >>> schedule = optim.cosine(1.0, total_steps=12, warmup_steps=4)
        >>> [round(schedule(step), 3) for step in (0, 4, 8, 12)]
        [0.25, 1.0, 0.5, 0.0]
    """

    def _shape(self, done: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * done))


class linear(_Decay):
    """Linear warm-up to `peak`, then a straight line down to `final` at `total_steps` and beyond.

    Args:
        peak: In the unit of the hyperparameter.
        total_steps: More than `warmup_steps`.
        warmup_steps: 0 for no warm-up.
        final: In the unit of the hyperparameter.

    Raises:
        ValueError: The warm-up is negative or leaves no step for the decay.

    Example:
        >>> from fusion_compile import optim
        >>> schedule = optim.linear(1.0, total_steps=4)
        >>> [schedule(step) for step in (0, 1, 4)]
        [1.0, 0.75, 0.0]
    """

    def _shape(self, done: float) -> float:
        return 1.0 - done


@dataclass(frozen=True)
class rex(_Decay):
    """Linear warm-up to `peak`, then ``(1 - done)^alpha`` down to `final` at `total_steps` and beyond.

    KempnerForge's ``rex``; with alpha below 1 the rate stays high for long.

    Args:
        peak: In the unit of the hyperparameter.
        total_steps: More than `warmup_steps`.
        warmup_steps: 0 for no warm-up.
        final: In the unit of the hyperparameter.
        alpha: Exponent; 1 is `linear`.

    Raises:
        ValueError: The warm-up is negative or leaves no step for the decay; `alpha` is not positive.

    Example:
        >>> from fusion_compile import optim
        >>> schedule = optim.rex(1.0, total_steps=4, alpha=2.0)
        >>> [schedule(step) for step in (0, 2, 4)]
        [1.0, 0.25, 0.0]
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(None, 0, alpha=self.alpha)
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} is not a positive exponent; 1 is a straight line.")

    def _shape(self, done: float) -> float:
        return float((1.0 - done) ** self.alpha)


_TAILS = ("linear", "cosine", "sqrt")


def _tail(kind: str, left: float) -> float:
    """What is left of the rate where the share `left` of the decay is left."""
    if kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * left))
    return 1.0 - math.sqrt(1.0 - left) if kind == "sqrt" else left


@dataclass(frozen=True)
class wsd:
    """Warm-up, stable, decay (2404.06395).

    Linear warm-up to `peak`, which holds until the last `decay_fraction` of all steps, then down to `final` at
    `total_steps` and beyond, along `tail`.

    Args:
        peak: In the unit of the hyperparameter.
        total_steps: Length of the run.
        warmup_steps: 0 for no warm-up.
        decay_fraction: Share of all steps that decay, in (0, 1].
        final: In the unit of the hyperparameter.
        tail: ``"linear"``, ``"cosine"`` (half a wave) or ``"sqrt"``, 1 - √done (2405.18392).

    Raises:
        ValueError: The warm-up is negative or reaches into the decay; `decay_fraction` is not a share; `tail` is not
            known.

    Example:
        >>> from fusion_compile import optim
        >>> schedule = optim.wsd(1.0, total_steps=10, warmup_steps=2)
        >>> [round(schedule(step), 3) for step in (0, 2, 8, 9, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final: float = 0.0
    tail: str = "linear"

    def __post_init__(self) -> None:
        if self.tail not in _TAILS:
            raise ValueError(f"tail={self.tail!r} is not known; use one of {', '.join(map(repr, _TAILS))}.")
        numbers = {"peak": self.peak, "final": self.final, "decay_fraction": self.decay_fraction}
        _check(self.total_steps, self.warmup_steps, **numbers)
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"decay_fraction={self.decay_fraction} is not a share of the steps; give 0 to 1, 0 excluded."
            )
        if self.warmup_steps > self.total_steps * (1 - self.decay_fraction):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} reaches into the decay, the last {self.decay_fraction} of "
                f"{self.total_steps} steps; shorten one of them."
            )

    def __call__(self, step: int) -> float:
        left = min(1.0, max(0.0, (1.0 - step / self.total_steps) / self.decay_fraction))
        return self.final + (self.peak * _warmup(step, self.warmup_steps) - self.final) * _tail(self.tail, left)
