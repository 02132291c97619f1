"""The fields of a transform's state: which tensors have the form of a bank, which are numbers, and how to replace some.

A field is the name that a NamedTuple of the state gives to a dictionary of tensors by bank key: ``mu``, ``nu``, ``z``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from fusion_compile.optim._transform import State

Replace = Callable[[str, str, Any], Any]
"""``(path, field, content) -> content``."""


def fields_of(state: State, banks: Collection[str]) -> tuple[list[str], list[str]]:
    """Names of the fields of `state` that hold tensors by bank key, and of those that hold numbers.

    `banks`: all bank keys.
    """
    tensors: dict[str, None] = {}
    numbers: dict[str, None] = {}

    def look(tree: Any) -> None:
        if isinstance(tree, Tensor):
            return
        for name, content in _children(tree):
            if hasattr(tree, "_fields") and is_banked(content, banks):
                tensors[name] = None
            elif hasattr(tree, "_fields") and _is_number(content):
                numbers[name] = None
            else:
                look(content)

    look(state)
    return list(tensors), list(numbers)


def replaced(state: State, fields: Collection[str], replace: Replace, path: str = "") -> State:
    """`state` with the content of every field whose name is in `fields` as `replace` gives it."""

    def one(name: str, content: Any) -> Any:
        at = f"{path}/{name}"
        if isinstance(content, Tensor):
            return content
        if name in fields and hasattr(state, "_fields"):
            return replace(at, name, content)
        return replaced(content, fields, replace, at)

    new = {name: one(name, content) for name, content in _children(state)}
    if isinstance(state, dict):
        return new
    if hasattr(state, "_fields"):
        return type(state)(**new)
    return tuple(new.values())


def is_banked(content: Any, banks: Collection[str]) -> bool:
    """Whether `content` is a dictionary of tensors of the form of banks, by bank key."""
    if not isinstance(content, dict) or not content:
        return False
    return not [key for key, t in content.items() if not isinstance(t, Tensor) or t.ndim == 0 or key not in banks]


def _is_number(content: Any) -> bool:
    if isinstance(content, dict):
        return bool(content) and not [t for t in content.values() if not isinstance(t, Tensor) or t.ndim]
    return isinstance(content, Tensor) and content.ndim == 0


def _children(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return list(tree.items())
    if hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    return [(str(i), child) for i, child in enumerate(tree)]
