"""From whatever a user calls an optimizer to a checked transform."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch

from fusion_compile.optim._transform import Transform
from fusion_compile.optim.recipes import RECIPES


def resolve_optimizer(optimizer: str | Transform | Callable[[], Transform]) -> Transform:
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
        if optimizer not in RECIPES:
            close = difflib.get_close_matches(optimizer, RECIPES, n=1)
            raise ValueError(
                f"optimizer={optimizer!r} is not a recipe; use one of {', '.join(RECIPES)}, or a Transform."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
        made = RECIPES[optimizer]()
    elif not isinstance(optimizer, Transform) and callable(optimizer) and not _is_torch_optimizer(optimizer):
        made = optimizer()
        if not isinstance(made, Transform):
            raise TypeError(
                f"optimizer={_shown(optimizer)} returned a {type(made).__name__}; it must return a Transform, as "
                f"optim.adamw does."
            )
    if not isinstance(made, Transform):
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise TypeError(
            f"optimizer is {given}; give a recipe's name ({', '.join(RECIPES)}), a Transform from "
            f"fusion_compile.optim, or a callable that makes a Transform (a torch.optim.Optimizer cannot be captured)."
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


def _is_torch_optimizer(optimizer: object) -> bool:
    """Whether it is one of torch's optimizers, or the class of one (which is callable too)."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return issubclass(kind, torch.optim.Optimizer)


def _shown(made_by: object) -> str:
    return str(getattr(made_by, "__qualname__", made_by))
