"""What a callable consists of: the function that runs, what it is bound to, closure cells, default arguments."""

from __future__ import annotations

import functools
import types
from typing import Any

Part = tuple[str, Any]
"""A label, and the part itself."""

LRU_CACHE: Any = type(functools.lru_cache(lambda: None))


def parts_of(value: Any, label: str) -> list[Part]:
    """What a callable that wraps or binds another one consists of; nothing for functions and everything else."""
    kind = type(value)
    if kind is types.MethodType:
        return [(f"{label}.__self__", value.__self__), (label, value.__func__)]
    if kind is types.BuiltinMethodType:  # the `append` of a list, given as a hook
        return [(f"{label}.__self__", value.__self__)]
    if issubclass(kind, functools.partial):
        named = [(f"{label}.args", value.args), (f"{label}.keywords", value.keywords)]
        return [(label, value.func), *named, (label, vars(value))]
    if kind is staticmethod or kind is classmethod:
        return [(label, value.__func__)]
    if kind is LRU_CACHE:
        return [(label, value.__wrapped__)]
    if kind is functools.cached_property:
        return [(label, value.func)]
    if kind is property:
        return [(label, part) for part in (value.fget, value.fset, value.fdel) if part is not None]
    return []


def free_variables(function: types.FunctionType) -> list[tuple[str, types.CellType]]:
    """The names that `function` takes from around it, with their cells."""
    return list(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))


def defaults_of(function: types.FunctionType) -> list[Part]:
    """The arguments of `function` that have default values, with these."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][-len(defaults) :] if defaults else ()
    return [*zip(names, defaults, strict=False), *(function.__kwdefaults__ or {}).items()]
