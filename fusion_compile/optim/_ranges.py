"""The range of every hyperparameter, in one table; read when a number is given, scheduled or loaded.

A number outside of its range is never what somebody meant: a negative rate goes uphill, a decay of 1 divides by zero.
``torch.optim`` refuses the same numbers when an optimizer is made, and takes any number afterwards.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any, NamedTuple

from fusion_compile.optim import _schedules


class Range(NamedTuple):
    """From `lowest` to `highest`, and whether `highest` itself belongs to it; `why` says what is wrong outside."""

    lowest: float
    highest: float
    with_highest: bool
    why: str

    def holds(self, number: float) -> bool:
        """Whether `number` lies in the range. Not a number never does."""
        return self.lowest <= number and (number <= self.highest if self.with_highest else number < self.highest)

    def __str__(self) -> str:
        if math.isinf(self.highest):
            least = "" if math.isinf(self.lowest) else f" of at least {self.lowest:g}"
            return f"a number{least}, or inf for none" if self.with_highest else f"a finite number{least}"
        return f"{self.lowest:g} to {self.highest:g}" + ("" if self.with_highest else f", {self.highest:g} excluded")


_DECAY = Range(0, 1, False, "the decay of an average lies below 1, and at 1 the average never moves")
_BETWEEN = Range(0, 1, True, "a share lies from 0 to 1")
_NORM = Range(0, math.inf, True, "a norm is never negative: clipping to it would turn every gradient round")
_FACTOR = Range(
    0, math.inf, False, "a negative factor would turn the step round, and an infinite one would be the step"
)
_BOUND = Range(0, math.inf, True, "a bound on a positive factor is never negative")

RANGES: dict[str, Range] = {
    "lr": Range(0, math.inf, False, "a negative rate goes uphill, and an infinite one leaves no weight finite"),
    "weight_decay": Range(0, math.inf, False, "a negative decay makes weights grow, and an infinite one is no weight"),
    "eps": Range(0, math.inf, False, "it is added to a root, which a negative number turns round"),
    "ema_rate": _BETWEEN,
    "momentum": _DECAY,
    "beta1": _DECAY,
    "beta2": _DECAY,
    # Schedule-Free's β is a place between z (0) and x (1), which may be either.
    "schedule_free_beta": _BETWEEN,
    "schedule_free_beta_max": _BETWEEN,
    "polyak_beta": _DECAY,
    "shampoo_beta": _DECAY,
    "mona_beta": _DECAY,
    "mona_alpha": Range(-math.inf, math.inf, False, "a weight of the acceleration is finite"),
    "snr_beta": _DECAY,
    "snr_floor": _BETWEEN,
    "snr_power": _FACTOR,
    "loss_ratio_beta": _DECAY,
    "loss_ratio_minimum": _FACTOR,
    "loss_ratio_maximum": _BOUND,
    "autoscale_growth": Range(1, math.inf, True, "below 1 the estimated distance would shrink to nothing"),
    "autoscale_beta3": _BETWEEN,  # at 1 the sums are D-Adaptation's, which forget nothing
    "autoscale_coefficient": _FACTOR,
    "d_coef": _FACTOR,
    "growth_rate": Range(1, math.inf, True, "below 1 the estimated distance would shrink to nothing"),
    "layer_weight": _FACTOR,
    "scale": _FACTOR,
    "look_ahead": _FACTOR,
    "pnm_beta0": _FACTOR,
    "clip_threshold": _BOUND,
    "clip_grad_norm": _NORM,
    "max_norm": _NORM,
    # Of `fusionopt_compat`, in FusionOpt's words.
    "mu": _DECAY,
    "beta": _BETWEEN,
    "beta_p": _DECAY,
    "beta_n": _DECAY,
    "beta_k": _DECAY,
    "beta_r": _DECAY,
    "gamma_min": _FACTOR,
    "gamma_max": _BOUND,
    "gamma_scale": _FACTOR,
    "shampoo_delta": _FACTOR,
}
"""By the name under which a part declares the number. `range_of` finds it under other names, too."""

_BEFORE_A_WORD = re.compile(r"[._]")


@functools.cache
def range_of(name: str) -> Range | None:
    """The range of the hyperparameter `name`; None where the table has none.

    A group's number, a number with a prefix and a layer's number have the range of what they end in:
    ``no_decay.weight_decay``, ``scalar_beta1``, ``head_lr``, ``layer_weight.11``.
    """
    name = re.sub(r"\.\d+$", "", name)
    starts = [0, *(match.end() for match in _BEFORE_A_WORD.finditer(name))]
    return next((RANGES[name[at:]] for at in starts if name[at:] in RANGES), None)


def refuse_out_of_range(name: str, number: float, said: str | None = None) -> None:
    """Raise ValueError for a `number` that `name` cannot have.

    `said`: the subject of the sentence, ``hyperparameter 'lr'`` by default.
    """
    said = f"hyperparameter {name!r}" if said is None else said
    if math.isnan(number):
        raise ValueError(f"{said} was given nan; give a number.")
    within = range_of(name)
    if within is not None and not within.holds(number):
        raise ValueError(f"{said} is {number}, but {within.why}. Give {within}.")


def refuse_given(name: str, value: Any, said: str | None = None) -> None:
    """Raise ValueError for a number, or a schedule of this package, that leaves the range of `name`.

    Other callables are not called: what they give is looked at when it is used. Anything else passes.
    """
    for what, number in _numbers_in(value):
        subject = f"hyperparameter {name!r}" if said is None else said
        refuse_out_of_range(name, float(number), f"{subject}{what}")


def _numbers_in(value: Any) -> Iterator[tuple[str, Real]]:
    """The number that `value` is, or the ends of a schedule of this package (what lies between is between them)."""
    if is_number(value):
        yield "", value
    elif is_dataclass(value) and not isinstance(value, type) and type(value).__module__ == _schedules.__name__:
        for end in (field.name for field in fields(value) if field.name in ("value", "peak", "final")):
            yield f" (whose schedule {value} has this {end})", getattr(value, end)


def is_number(value: object) -> bool:
    """Whether `value` is a Python or NumPy number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool)
