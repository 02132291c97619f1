"""MODULE:FACTORY, as commands take it: a function without arguments that makes a program and the inputs of a call."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


class FactoryError(ValueError):
    """A name that leads to no factory, or a factory that returns something unsuitable, in one sentence."""


class Made(NamedTuple):
    """What a factory made: an object, the arguments of one call of it, and further calls; empty if it gave none."""

    obj: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: tuple[Any, ...] = ()


def call_factory(target: str) -> Made:
    """Import MODULE of ``"MODULE:FACTORY"`` and call its FACTORY.

    The working directory is on the import path, as under ``python -m``. FACTORY may be dotted (``Maker.step``). It
    returns an object, or ``(object, args)``, or ``(object, args, kwargs)`` with a tuple or list and a dictionary, or
    ``(object, args, kwargs, calls)`` with the further calls that `explain` takes.

    Raise FactoryError, a ValueError, if there is no such module or function, or it returns another tuple. Errors inside
    the module or the factory pass through.
    """
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise FactoryError(f"{target!r} is not MODULE:FACTORY, as in train:make_step.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise FactoryError(
            f"{target}: module {module!r} cannot be imported: there is none here or on the import path, nor a file "
            f"{target}."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise FactoryError(f"{target}: {module} has no function {attribute!r}; give one that takes no arguments.")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(
            f"{target}: {module} has no function {attribute!r}: it is a {type(found).__name__}; give a function that "
            "takes no arguments."
        )
    made = found()
    obj, args, kwargs, calls = _parts(made) if isinstance(made, tuple) else (made, (), {}, ())
    if not (isinstance(args, tuple | list) and isinstance(kwargs, Mapping) and isinstance(calls, tuple | list)):
        raise FactoryError(
            f"{target} returned {described(made)}; it must return an object, (object, args), (object, args, kwargs) or "
            "(object, args, kwargs, calls), with a tuple, a dictionary and a list of calls."
        )
    return Made(obj, tuple(args), dict(kwargs), tuple(calls))


def described(made: Any) -> str:
    """Name the type of `made`, or of each of its parts if it is a tuple: ``(DiT, int)``."""
    return f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__


def _parts(made: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    if not 2 <= len(made) <= 4:
        return made, None, None, None
    given = (*made, *((), {}, ())[len(made) - 1 :])
    return given[0], given[1], given[2], given[3]
