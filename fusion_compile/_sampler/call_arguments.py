"""The arguments of one call as users write them: a tuple, keywords, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Arguments: TypeAlias = tuple[Any, ...] | Mapping[str, Any] | tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional arguments, keyword arguments, or a pair of both."""


def as_args_and_kwargs(example_inputs: Arguments) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return `example_inputs` as positional and keyword arguments.

    A tuple of a tuple and a dictionary is a pair. Raises TypeError for anything else than the three forms.
    """
    if not isinstance(example_inputs, tuple | Mapping):
        raise TypeError(
            f"example_inputs is a {type(example_inputs).__name__}; pass a tuple (x, t, y), a dictionary of keywords, "
            f"or a pair (args, kwargs)."
        )
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = example_inputs
    elif len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
        args, kwargs = example_inputs
    else:
        args = example_inputs
    refuse_other_forms(args, kwargs, "example_inputs")
    return args, kwargs


def refuse_other_forms(args: object, kwargs: object, what: str) -> None:
    """Raise TypeError, with `what` named, unless `args` is a tuple and `kwargs` a dictionary with names as keys."""
    if not isinstance(args, tuple):
        raise TypeError(
            f"{what}: args is a {type(args).__name__}; pass a tuple of the call's positional arguments, (x, t, y), and "
            f"named ones in kwargs={{'y': y}}."
        )
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise TypeError(f"{what}: kwargs is {_described(kwargs)}; pass a dictionary from argument names to values.")


def _described(kwargs: object) -> str:
    if isinstance(kwargs, Mapping):
        return f"a dictionary with the key {next(name for name in kwargs if not isinstance(name, str))!r}"
    return f"a {type(kwargs).__name__}"
