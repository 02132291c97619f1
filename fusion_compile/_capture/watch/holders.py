"""What holds watched values, what it held, and how two values are told apart."""

from __future__ import annotations

import collections
import functools
import gc
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_compile._capture.watch.slots import ABSENT, CELL, Slot, class_dict

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(Ellipsis))
_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__", "__dict__")
_WRITTEN_BY_PYTHON = frozenset(
    ("__annotations__", "__annotations_cache__", "__annotate_func__", "__doc__", "__abstractmethods__", "_abc_impl")
)
"""Entries of a class that Python fills in when somebody asks for them."""

WHOLE = None
"""Instead of keys: everything in the holder."""


@dataclass(eq=False)
class Holder:
    """`container` and the part of it that is watched. `keys`: WHOLE, or these alone. `style`: how a key is written
    behind `label`: ``".k"`` for an attribute, ``"[k]"`` for an item, ``""`` for nothing."""

    container: Any
    label: str
    style: str = "[k]"
    keys: tuple[Any, ...] | None = WHOLE
    held: dict[Any, Any] = field(default_factory=dict)

    def remember(self) -> None:
        """What it holds now is what it should hold."""
        self.held = self.contents()

    def contents(self) -> dict[Any, Any]:
        """Key -> present value of what is watched; keys that hold nothing are left out."""
        if self.keys is not WHOLE:
            values = {key: Slot(self.container, key, "").value() for key in self.keys}
            return {key: value for key, value in values.items() if value is not ABSENT}
        return contents(self.container)

    def differences(self) -> Iterator[tuple[Any, Any, Any]]:
        """``(key, before, after)`` of whatever is another object now."""
        now = self.contents()
        for key in [*self.held, *(key for key in now if key not in self.held)]:
            before, after = self.held.get(key, ABSENT), now.get(key, ABSENT)
            if before is not after and not (isinstance(self.container, (set, frozenset)) and before == after):
                yield key, before, after

    def named(self, key: Any) -> str:
        """The full name of `key`."""
        if key is None or key == CELL:
            return self.label
        if isinstance(self.container, Tensor):
            return f"{self.label}'s gradient hook"
        if self.style == ".k":
            return f"{self.label}.{key}" if self.label else str(key)
        return f"{self.label}[{key!r}]" if self.style == "[k]" else self.label

    def traversed(self) -> Any:
        """What `gc.get_referents` takes apart into the contents."""
        return gc.get_referents(class_dict(self.container))[0] if isinstance(self.container, type) else self.container


def contents(container: Any) -> dict[Any, Any]:
    """Key -> value of everything in `container`. Methods that a subclass overrides are not called."""
    if isinstance(container, dict):
        return dict.copy(container)
    kinds: tuple[Any, ...] = (list, tuple, collections.deque)
    for kind in kinds:
        if isinstance(container, kind):
            return dict(enumerate(kind.__iter__(container)))
    if isinstance(container, (set, frozenset)):
        return {None: frozenset(container)}
    if isinstance(container, types.CellType):
        value = Slot(container, CELL, "").value()
        return {} if value is ABSENT else {CELL: value}
    if isinstance(container, types.FunctionType):
        return {name: getattr(container, name) for name in _OF_FUNCTIONS}
    if isinstance(container, functools.partial):
        return {"func": container.func, "args": container.args, "keywords": container.keywords}
    if isinstance(container, type):
        return {key: value for key, value in class_dict(container).items() if key not in _WRITTEN_BY_PYTHON}
    if isinstance(container, Tensor):
        return dict(enumerate(hooks_of(container)))
    found = {name: Slot(container, name, "").value() for name in slot_names(container)}
    return {"__class__": type(container), **{k: v for k, v in found.items() if v is not ABSENT}}


def hooks_of(tensor: Tensor) -> tuple[Any, ...]:
    """The functions that torch calls when `tensor`'s gradient arrives."""
    both = (getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))
    return tuple(hook for hooks in both for hook in (hooks or {}).values())


def slot_names(value: object) -> tuple[str, ...]:
    """The names that `value`'s class and its bases declare in ``__slots__``."""
    kind: Any = type(value)
    return _slot_names(kind)


@functools.cache
def _slot_names(kind: Hashable) -> tuple[str, ...]:
    assert isinstance(kind, type)
    descriptors = (pair for owner in kind.__mro__ for pair in class_dict(owner).items())
    names = (name for name, value in descriptors if isinstance(value, types.MemberDescriptorType))
    return tuple(name for name in names if name != "__dict__")


def is_alike(now: Any, before: Any, depth: int = 6) -> bool:
    """Whether two objects are the same value: plain values of one type that are equal, and containers of such or of the
    same objects. Tensors, modules and other objects are themselves only."""
    if now is before:
        return True
    if type(now) is not type(before) or depth == 0:
        return False
    if isinstance(before, (float, complex)):
        return repr(now) == repr(before)  # -0.0 is not 0.0, and nan is nan
    if isinstance(before, PLAIN):
        return bool(now == before)
    if isinstance(before, (dict, types.MappingProxyType)):
        return now.keys() == before.keys() and all(is_alike(now[key], before[key], depth - 1) for key in before)
    if isinstance(before, (list, tuple, collections.deque)):
        return len(now) == len(before) and all(map(functools.partial(is_alike, depth=depth - 1), now, before))
    if isinstance(before, (set, frozenset)):
        return bool(now == before)
    if isinstance(before, np.ndarray):
        return bool(now.dtype == before.dtype and now.shape == before.shape and now.tobytes() == before.tobytes())
    if isinstance(before, np.generic):
        return bool(now.tobytes() == before.tobytes())
    if isinstance(before, types.MethodType):
        return now.__func__ is before.__func__ and now.__self__ is before.__self__
    if isinstance(before, types.BuiltinMethodType):
        return now.__self__ is before.__self__ and now.__name__ == before.__name__
    if isinstance(before, functools.partial):
        parts = ("func", "args", "keywords")
        return all(is_alike(getattr(now, part), getattr(before, part), depth - 1) for part in parts)
    return False
