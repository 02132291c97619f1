"""The `optimizer` argument of both doors: a recipe's name, a `Transform`, or a callable that makes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform
from fusion_compile.optim.recipes import RECIPES

OptimizerChoice: TypeAlias = "str | Transform | Callable[[], Transform]"


def resolve_optimizer(optimizer: OptimizerChoice) -> Transform:
    """The transform that `optimizer` chooses. Anything else is a ValueError or TypeError that says what to give."""
    if isinstance(optimizer, Transform):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in RECIPES:
            raise ValueError(
                f"optimizer={optimizer!r} is not a recipe; use one of {', '.join(RECIPES)}, or a Transform."
            )
        return RECIPES[optimizer]()
    made: Any = optimizer
    if _makes_without_arguments(optimizer):
        made = optimizer()
    if not isinstance(made, Transform):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; give a recipe's name ({', '.join(RECIPES)}), a Transform from "
            f"fusion_compile.optim, or a callable without arguments that makes a Transform (a torch.optim.Optimizer "
            f"cannot be captured)."
        )
    return made


def _makes_without_arguments(optimizer: Any) -> bool:
    if not callable(optimizer) or isinstance(optimizer, torch.nn.Module | torch.optim.Optimizer):
        return False
    try:
        inspect.signature(optimizer).bind()
    except (TypeError, ValueError):
        return False
    return True


def with_rate(transform: Transform, lr: float | Schedule | None) -> dict[str, float | Schedule]:
    """The transform's hyperparameters with `lr` in place of its own rate. ValueError if it has no ``lr``."""
    numbers: Mapping[str, float | Schedule] = transform.hyperparameters
    if lr is None:
        return dict(numbers)
    if "lr" not in numbers:
        raise ValueError(f"lr was given, but {transform.name} has no hyperparameter 'lr'; it has {', '.join(numbers)}.")
    return {**numbers, "lr": lr}
