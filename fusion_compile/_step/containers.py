"""Containers of a batch: what lies in them, and the same container around other tensors.

Tuples, NamedTuples, lists, dictionaries, ``UserDict`` (transformers' BatchEncoding), dictionaries that are dataclasses
(ModelOutput), and dataclasses. The loss gets what it gets in the ordinary loop: an object of the same class.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor

_PLAIN = (dict, list, tuple)
_MAPPINGS = (dict, UserDict)


def children(tree: Any) -> list[tuple[str, Any]] | None:
    """``(step of the path, child)`` of a container; None for a leaf, as a ``torch.Size`` is one."""
    if isinstance(tree, torch.Size):
        return None
    if isinstance(tree, _MAPPINGS):
        return [(f"[{key!r}]", child) for key, child in tree.items()]
    if isinstance(tree, tuple | list):
        return [(f"[{i}]", child) for i, child in enumerate(tree)]
    if _is_dataclass(tree):
        return [(f".{name}", getattr(tree, name)) for name in _fields(tree)]
    return None


def special_containers(tree: Any, path: str = "batch") -> Iterator[tuple[str, type]]:
    """Path and class of every container that is no plain tuple, list or dictionary."""
    inner = children(tree)
    if inner is None:
        return
    if type(tree) not in _PLAIN:
        yield path, type(tree)
    for step, child in inner:
        yield from special_containers(child, path + step)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with ``fn(tensor)`` in the place of each tensor; containers are new, and of the same class."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with ``fn(leaf)`` in the place of each leaf, in the order of `children`; containers are new, and of the
    same class."""
    if children(tree) is None:
        return fn(tree)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, map_leaves(fn, child)) for key, child in tree.items())
    if isinstance(tree, tuple | list):
        inner = [map_leaves(fn, child) for child in tree]
        return type(tree)(*inner) if hasattr(tree, "_fields") else type(tree)(inner)
    if isinstance(tree, _MAPPINGS):
        new = copy(tree)  # with its default factory, its attributes
        for key, child in tree.items():
            new[key] = map_leaves(fn, child)
        return new
    new = copy(tree)
    for name in _fields(tree):
        object.__setattr__(new, name, map_leaves(fn, getattr(tree, name)))  # frozen dataclasses, too
    return new


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]
