"""Remove from a model what a trace left in it.

Tracing runs a model's own Python, which may keep what it computes. A rotary embedding that fills its table at the first
call, in an attribute of a plain object or in an ``lru_cache``, would be left with tensors that have no data, and the
model's next call would compute from whatever lies in memory.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fusion_compile._compat import is_of_a_trace

_PLACES = (dict, list)
"""Containers that can be restored in place; tuples and sets made by a trace lie in one of these."""

_LEAVES = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes, int, float)
_CACHE: Any = type(functools.lru_cache(lambda: None))


@contextlib.contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Restore, at the end of the block, everything in which a trace inside the block left its tensors.

    These are the attributes of `model`'s modules and of the plain objects and containers in them. Function caches that
    were filled inside the block are emptied; they are looked for in the classes of the model and in their Python files.
    """
    places = [(place, dict(_items(place))) for place in _places(model)]
    caches = [(cache, cache.cache_info().misses) for cache in _caches(model)]
    try:
        yield
    finally:
        for place, before in places:
            # An unchanged value is a place of its own, so its contents are restored there.
            left = [k for k, value in _items(place) if value is not before.get(k) and _holds_trace(value, set())]
            if left and isinstance(place, list):
                place[:] = before.values()
            elif isinstance(place, dict):
                for key in left:
                    if key in before:
                        place[key] = before[key]
                    else:
                        del place[key]
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _places(model: nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """The dictionaries and lists of `model`'s Python state, each once, including those in attributes."""
    seen: set[int] = set()
    todo: list[Any] = [vars(module) for module in model.modules()]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _PLACES):
            yield value
        todo += _inside(value)


def _items(place: dict[Any, Any] | list[Any]) -> list[tuple[Any, Any]]:
    return list(place.items()) if isinstance(place, dict) else list(enumerate(place))


def _inside(value: Any) -> list[Any]:
    if isinstance(value, _LEAVES):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return [vars(value)] if hasattr(value, "__dict__") else []


def _holds_trace(value: Any, seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        return is_of_a_trace(value)
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_holds_trace(inner, seen) for inner in _inside(value))


def _caches(model: nn.Module) -> set[Any]:
    found: set[Any] = set()
    for owner in {kind for module in model.modules() for kind in type(module).__mro__}:
        if owner.__module__.partition(".")[0] in ("torch", "builtins", "abc"):
            continue
        for scope in (vars(owner), vars(sys.modules.get(owner.__module__, types.ModuleType("")))):
            functions = (getattr(value, "__func__", value) for value in scope.values())
            found |= {f for f in functions if isinstance(f, _CACHE)}
    return found
