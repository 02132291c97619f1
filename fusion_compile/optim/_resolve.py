"""From whatever a user calls an optimizer to a checked transform."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import TypeAlias

import torch

from fusion_compile.optim._registry import factory_of, names
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform

OptimizerChoice: TypeAlias = "str | Transform | Callable[[], Transform]"
"""What both doors take as `optimizer`."""


def resolve_optimizer(optimizer: OptimizerChoice) -> Transform:
    """The transform that `optimizer` stands for, checked to take a step.

    Args:
        optimizer: A recipe's name, a `Transform`, or a callable without arguments that makes one
            (``optim.adamw``, ``functools.partial(optim.adamw, eps=1e-6)``).

    Returns:
        A transform with ``descends``.

    Raises:
        ValueError: The name is not a recipe's, or the transform takes no step.
        TypeError: Anything else is given, or the callable returns something else.

    Example:
        >>> resolve_optimizer("adamw").name
        'adamw'
    """
    made = optimizer
    if isinstance(optimizer, str):
        factory = factory_of(optimizer)
        if factory is None:
            close = difflib.get_close_matches(optimizer, names(), n=1)
            raise ValueError(
                f"optimizer={optimizer!r} is not a recipe; use one of {', '.join(names())}, or a Transform."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
        made = factory()
    elif not isinstance(optimizer, Transform) and callable(optimizer) and _makes_without_arguments(optimizer):
        made = optimizer()
        if not isinstance(made, Transform):
            raise TypeError(
                f"optimizer={_shown(optimizer)} returned a {type(made).__name__}; it must return a Transform, as "
                f"optim.adamw does."
            )
    if not isinstance(made, Transform):
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise TypeError(
            f"optimizer is {given}; give a recipe's name ({', '.join(names())}), a Transform from "
            f"fusion_compile.optim, or a callable without arguments that makes a Transform (a torch.optim.Optimizer "
            f"cannot be captured)."
        )
    refuse_without_step(made)
    return made


def refuse_without_step(transform: Transform) -> None:
    """ValueError unless `transform` takes a step: its updates would be added to the weights and go uphill."""
    if not transform.descends:
        name = transform.name
        raise ValueError(
            f"{name} takes no step: it only turns gradients into directions, and adding those to the weights goes "
            f"uphill. Put it in a chain with a learning rate: chain({name}, scale_by_learning_rate(1e-3)). A transform "
            f"of your own that multiplies by its own negative rate declares Extras(descends=True)."
        )


def with_rate(transform: Transform, lr: float | Schedule | None) -> dict[str, float | Schedule]:
    """The transform's hyperparameters with `lr` in place of its own rate. ValueError if it has no ``lr``."""
    numbers = transform.hyperparameters
    if lr is None:
        return dict(numbers)
    if "lr" not in numbers:
        raise ValueError(f"lr was given, but {transform.name} has no hyperparameter 'lr'; it has {', '.join(numbers)}.")
    return {**numbers, "lr": lr}


def _makes_without_arguments(optimizer: Callable[..., object]) -> bool:
    """Whether calling it may make a transform. Calling a module, or an optimizer class of torch, does not."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, torch.optim.Optimizer | torch.nn.Module):
        return False
    try:
        inspect.signature(optimizer).bind()
    except (TypeError, ValueError):
        return False
    return True


def _shown(made_by: object) -> str:
    return str(getattr(made_by, "__qualname__", made_by))
