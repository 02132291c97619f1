"""A holder, an object with slots: all that it holds, remembered by content and put back in place."""

from __future__ import annotations

import collections
import contextvars
import functools
import types
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fusion_compile._capture.python_state._compat import WRITTEN_BY_DYNAMO, hooks_of
from fusion_compile._capture.python_state.attributes import slot_descriptors
from fusion_compile._capture.python_state.slots import (
    MISSING,
    WHOLE,
    Slot,
    built_in,
    class_dict,
    key_identity,
    named_key,
    read,
    refill,
    values_in,
    write,
)

Items = list[tuple[Any, Any]]
Style = Literal[".k", "[k]", ""]

_SEQUENCES = (list, collections.deque, set)
_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__", "__dict__")
_OF_PARTIALS = ("func", "args", "keywords")
_DECIDE_NOTHING = frozenset(
    (
        *(
            "__annotations__",
            "__annotations_cache__",
            "__annotate_func__",
            "__doc__",
            "__abstractmethods__",
            "_abc_impl",
        ),
        "__slotnames__",  # by copying or pickling an instance
        *WRITTEN_BY_DYNAMO,
    )
)
"""Entries of a class that Python or torch writes by itself, and that no call of an instance reads."""


@dataclass(eq=False)
class Holder:
    """An object whose slots are known.

    Attributes:
        value: A dictionary, list, tuple, deque, set, closure cell, context variable, function, partial, class, tensor
            (its hooks), or an object whose class declares ``__slots__``.
        label: What a reader calls it.
        style: How a key is written behind `label`: ``".k"`` for an attribute, ``"[k]"`` for an item, ``""`` not at all.
        keys: The keys that count; None for all.
    """

    value: Any
    label: str
    style: Style = "[k]"
    keys: tuple[Any, ...] | None = None

    def label_of(self, key: Any) -> str:
        """``model.1.cache`` or ``model.table[5]``; a key that is not plain is named by its type."""
        if key is WHOLE or self.style == "" or (key is None and not issubclass(type(self.value), dict)):
            return self.label
        if type(key) is types.MemberDescriptorType or self.style == ".k":
            name = name_of(key)
            return f"{self.label}.{name}" if self.label else str(name)
        return f"{self.label}[{named_key(key)}]"

    @property
    def is_dict(self) -> bool:
        """Whether all entries of a dictionary count."""
        return self.keys is None and issubclass(type(self.value), dict)

    @property
    def is_sequence(self) -> bool:
        """Whether what changes its length is reported as one change of the whole."""
        return self.keys is None and issubclass(type(self.value), _SEQUENCES)

    def items(self) -> Items:
        """``(key, value)`` of every slot that exists, or that counts; the elements of a set are keys and values."""
        value, kind = self.value, type(self.value)
        if self.keys is not None:
            return [(key, read(Slot(value, key, ""))) for key in self.keys]
        if issubclass(kind, dict):
            pairs = list(dict.items(value))
            if pairs and issubclass(kind, collections.OrderedDict):  # its order is its own
                by_key = {id(key): (key, inner) for key, inner in pairs}
                pairs = [by_key[id(key)] for key in collections.OrderedDict.__iter__(value)]
            return pairs
        if issubclass(kind, (list, tuple, collections.deque)):
            return list(enumerate(values_in(value)))
        if issubclass(kind, (set, frozenset)):
            return [(element, element) for element in values_in(value)]
        if issubclass(kind, type):
            return [(key, inner) for key, inner in class_dict(value).items() if key not in _DECIDE_NOTHING]
        if issubclass(kind, Tensor):
            return list(enumerate(hooks_of(value)))
        return [(key, read(Slot(value, key, ""))) for key in _keys_of(value, kind)]

    def put(self, items: Items, kept: Collection[tuple[int, Any]] = ()) -> None:
        """Write `items`, what `items()` once returned, back in place, apart from slots whose identity is in `kept`."""
        now = self.items()
        if is_same_content(now, items) or (id(self.value), key_identity(WHOLE)) in kept:
            return
        if kept:
            present = {key_identity(key): (key, value) for key, value in now}
            spared = {k: pair for k, pair in present.items() if (id(self.value), k) in kept}
            wanted = {key_identity(key): (key, value) for key, value in items}
            items = list((wanted | spared).values())
        if self.is_sequence:
            refill(self.value, [value for _, value in items])
        elif self.is_dict:
            _put_into_dict(self.value, now, items)
        else:
            for key, value in items:
                slot = Slot(self.value, key, "")
                if read(slot) is not value:
                    write(slot, value)


def name_of(key: Any) -> Any:
    """The name of an attribute that a slot's key stands for; other keys as they are."""
    return key.__name__ if type(key) is types.MemberDescriptorType else key


def is_same_content(a: Items, b: Items) -> bool:
    """Whether two readings of one holder have identical keys and values in the same order."""
    return len(a) == len(b) and all(
        v is w and (k is j or key_identity(k) == key_identity(j)) for (k, v), (j, w) in zip(a, b, strict=True)
    )


def _keys_of(value: Any, kind: type) -> tuple[Any, ...]:
    if kind is types.CellType or kind is contextvars.ContextVar:
        return (None,)
    if kind is types.FunctionType:
        return _OF_FUNCTIONS
    if issubclass(kind, functools.partial):
        return _OF_PARTIALS
    return ("__class__", *slot_descriptors(kind))


def _put_into_dict(holder: Any, now: Items, items: Items) -> None:
    own = built_in(type(holder))
    wanted = {key_identity(key) for key, _ in items}
    present = {key_identity(key): value for key, value in now}
    in_order = [key_identity(key) for key, _ in now if key_identity(key) in wanted]
    if in_order != [key_identity(key) for key, _ in items]:  # a key is gone or moved: only a refill restores the order
        own.clear(holder)
        present = {}
    for key, _ in now:
        if key_identity(key) not in wanted and present:
            own.pop(holder, key, None)
    for key, value in items:
        if present.get(key_identity(key), MISSING) is not value:
            own.__setitem__(holder, key, value)
