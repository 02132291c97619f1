"""The calls that `explain` makes: arguments in the form of torch.export, validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Invocation(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Call = Invocation | Callable[[], object]
"""A call of the program; or a function that changes something between two calls."""


def first_invocation(args: Any, kwargs: Any) -> Invocation:
    """Validate `args` and `kwargs` of `explain`.

    Raise TypeError for arguments that are not in the form of torch.export, as in ``explain(model, x, y)``.
    """
    if not isinstance(args, tuple):
        raise TypeError(
            f"explain() got a {type(args).__name__} as args; give the inputs of one call as a tuple: "
            "explain(model, (x, y), {'mask': mask})."
        )
    if kwargs is not None and not _is_keywords(kwargs):
        raise TypeError(
            f"explain() got a {type(kwargs).__name__} as kwargs; give all positional inputs in one tuple and keyword "
            "inputs in a dictionary: explain(model, (x, y), {'mask': mask})."
        )
    return Invocation(args, dict(kwargs or {}))


def further_calls(calls: Any) -> tuple[Call, ...]:
    """Validate `calls` of `explain`: each is a tuple of arguments, a pair of such a tuple and a dictionary, or a
    function without arguments that is called in between.

    Raise TypeError for anything else, and ValueError for a function at the end, behind which no call shows its effect.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise TypeError(f"explain() got a {type(calls).__name__} as calls; give a sequence of calls: calls=[(x, y)].")
    found: list[Call] = []
    for i, call in enumerate(calls):
        if callable(call) and not isinstance(call, tuple):
            if i == len(calls) - 1:
                raise ValueError(
                    f"explain() got {_named(call)} as the last of calls, so no call shows what it changes; give the "
                    "inputs of a call behind it: calls=[model.eval, (x,)]."
                )
            found.append(call)
            continue
        if not isinstance(call, tuple):
            raise TypeError(
                f"explain() got a {type(call).__name__} as calls[{i}]; each call is a tuple of arguments, (x, y), a "
                "pair of them with keywords, ((x, y), {'mask': mask}), or a function to call in between, model.eval."
            )
        is_pair = len(call) == 2 and isinstance(call[0], tuple) and _is_keywords(call[1])
        found.append(Invocation(call[0], dict(call[1])) if is_pair else Invocation(call, {}))
    return tuple(found)


def _named(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
