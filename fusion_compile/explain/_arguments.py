"""The calls that `explain` makes: arguments in the form of torch.export, validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Invocation(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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


def further_invocations(calls: Any) -> tuple[Invocation, ...]:
    """Validate `calls` of `explain`: each is a tuple of arguments, or a pair of such a tuple and a dictionary."""
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise TypeError(f"explain() got a {type(calls).__name__} as calls; give a sequence of calls: calls=[(x, y)].")
    found = []
    for i, call in enumerate(calls):
        if not isinstance(call, tuple):
            raise TypeError(
                f"explain() got a {type(call).__name__} as calls[{i}]; each call is a tuple of arguments, (x, y), or a "
                "pair of them with keywords, ((x, y), {'mask': mask})."
            )
        is_pair = len(call) == 2 and isinstance(call[0], tuple) and _is_keywords(call[1])
        found.append(Invocation(call[0], dict(call[1])) if is_pair else Invocation(call, {}))
    return tuple(found)


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
