"""Containers of a batch: what lies in them, and the same container around other tensors.

Tuples, NamedTuples, lists, dictionaries, ``UserDict`` (transformers' BatchEncoding), dictionaries that are dataclasses
(ModelOutput), dataclasses, and plain objects with attributes (SimpleNamespace, a cache of keys and values). The loss
gets what it gets in the ordinary loop: an object of the same class.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (dict, list, tuple)
_UNDIVIDED = (Tensor, torch.Size)
_MAPPINGS = (dict, UserDict)
_LEAVES = (Tensor, nn.Module, torch.Generator, enum.Enum, type, types.ModuleType, weakref.ref, BaseException)
"""Objects with attributes that are no containers."""
_MADE_BY_CLASS = 1 << 9
"""The flag of classes that a ``class`` statement made (Py_TPFLAGS_HEAPTYPE)."""


def children(tree: Any, *, objects: bool = True) -> list[tuple[str, Any]] | None:
    """``(step of the path, child)`` of a container; None for a leaf, as a ``torch.Size`` is one, and without `objects`
    a plain object."""
    if type(tree) is Tensor or isinstance(tree, _UNDIVIDED):  # most leaves are the first, which asks no metaclass
        return None
    if isinstance(tree, _MAPPINGS):
        return [(f"[{key!r}]", child) for key, child in tree.items()]
    if isinstance(tree, tuple | list):
        return [(f"[{i}]", child) for i, child in enumerate(tree)]
    if _is_dataclass(tree) or (objects and is_object(tree)):
        return [(f".{name}", getattr(tree, name)) for name in _fields(tree)]
    return None


def is_object(value: Any) -> bool:
    """Whether a value is a plain object, which is what its attributes say: its class is written in Python, and it is no
    module, function, iterator or class."""
    if isinstance(value, types.SimpleNamespace):
        return True
    if isinstance(value, _LEAVES) or callable(value) or hasattr(value, "__next__"):
        return False
    kind = type(value)
    return kind is not object and all(base.__flags__ & _MADE_BY_CLASS for base in kind.__mro__[:-1])


def leaves(tree: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """``(path, leaf)`` of nested containers."""
    inner = children(tree)
    if inner is None:
        yield path, tree
    else:
        for step, child in inner:
            yield from leaves(child, path + step)


def leaves_without_rings(tree: Any, path: str = "batch", around: tuple[tuple[int, str], ...] = ()) -> list[Any]:
    """The leaves. ValueError for a container that holds itself. `around`: id and path of those around it."""
    inner = children(tree)
    if inner is None:
        return [tree]
    for known, place in around:
        if known == id(tree):
            raise ValueError(f"{path} is {place} itself, around which it lies; a batch cannot hold what holds it.")
    around = (*around, (id(tree), path))
    return [leaf for step, child in inner for leaf in leaves_without_rings(child, path + step, around)]


def special_containers(tree: Any, path: str = "batch") -> Iterator[tuple[str, type]]:
    """Path and class of every container that is no plain tuple, list or dictionary."""
    inner = children(tree)
    if inner is None:
        return
    if type(tree) not in _PLAIN:
        yield path, type(tree)
    for step, child in inner:
        yield from special_containers(child, path + step)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any, *, objects: bool = True) -> Any:
    """`tree` with ``fn(tensor)`` in the place of each tensor; containers are new, and of the same class. Without
    `objects` a plain object stays as it is."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree, objects=objects)


def map_leaves(fn: Callable[[Any], Any], tree: Any, *, objects: bool = True) -> Any:
    """`tree` with ``fn(leaf)`` in the place of each leaf, in the order of `children`; containers are new, and of the
    same class."""
    inner = children(tree, objects=objects)
    if inner is None:
        return fn(tree)
    mapped = [map_leaves(fn, child, objects=objects) for _, child in inner]
    if type(tree) in (dict, OrderedDict):
        return type(tree)(zip(tree, mapped, strict=True))
    if isinstance(tree, tuple | list):
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    new = copy(tree)  # with a default factory, with attributes
    if isinstance(tree, _MAPPINGS):
        for key, child in zip(tree, mapped, strict=True):
            new[key] = child
        return new
    for name, child in zip(_fields(tree), mapped, strict=True):
        object.__setattr__(new, name, child)  # frozen dataclasses, too
    return new


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> list[str]:
    """The names under which a dataclass or a plain object keeps what it holds."""
    if _is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    return [*slots, *getattr(value, "__dict__", ())]


def _slots(kind: type) -> list[str]:
    named = vars(kind).get("__slots__", ())
    return [name for name in ((named,) if isinstance(named, str) else named) if name not in ("__dict__", "__weakref__")]
