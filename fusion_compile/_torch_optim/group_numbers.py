"""The numbers of a torch optimizer's parameter groups: as floats, and refused where they are none or out of range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_compile._torch_optim.named_groups import STEPS
from fusion_compile.optim._ranges import refuse_given, refuse_out_of_range
from fusion_compile.optim._schedules import Schedule


def as_float(value: Any) -> Any:
    """A number of any type as a float, a tensor of one number and a schedule's first value, too.

    Anything else is refused where it is used.
    """
    if callable(value):
        return as_float(value(0))
    if isinstance(value, Tensor):
        real = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        return float(value) if real else value
    return value if isinstance(value, str | bool) or not hasattr(value, "__float__") else float(value)


def as_shown(value: Any) -> Any:
    """`value` as ``param_groups`` show it: a float, but a tensor as itself, because its owner writes into it."""
    return value if isinstance(value, Tensor) else as_float(value)


def number_at(step: int, name: str, schedule: Schedule) -> float:
    """The number that `schedule` gives `name` after `step` steps. ValueError for one out of its range."""
    number = float(schedule(step))
    try:
        refuse_out_of_range(name, number)
    except ValueError as error:
        raise ValueError(f"{error} Its schedule gave that at step {step}: {schedule}.") from None
    return number


def check_number(at: int, name: str, value: Any) -> None:
    """Refuse what parameter group `at` cannot have for `name`: TypeError for no number, ValueError for a wrong one."""
    said = f"parameter group {at} sets {name!r}, which"
    refuse_given(name, value, said)
    number = as_float(value)
    if not isinstance(number, float):
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"parameter group {at} sets {name!r} to {shown}; give a number or a schedule.")
    refuse_out_of_range(name, number, said)


def check_numbers(numbers: Mapping[str, Any]) -> None:
    """Refuse an optimizer's numbers that are out of range. Other kinds are refused where they are used."""
    for name, value in numbers.items():
        refuse_given(name, value)
        if isinstance(first := as_float(value), float):
            refuse_out_of_range(name, first)


def check_saved(theirs: Iterable[Mapping[str, Any]], numbers: Iterable[str]) -> None:
    """Refuse a checkpoint's groups whose numbers or counts of steps cannot be this optimizer's."""
    names = list(numbers)
    for at, options in enumerate(theirs):
        for name in names:
            if name in options:
                try:
                    check_number(at, name, options[name])
                except (TypeError, ValueError) as error:
                    raise type(error)(f"the checkpoint is wrong, and nothing was loaded: {error}") from None
        steps = options.get(STEPS, 0)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(
                f"the checkpoint is wrong, and nothing was loaded: parameter group {at} has {STEPS}={steps!r}, which "
                f"is no count of steps."
            )
