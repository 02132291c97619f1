"""Where Python keeps a value: a slot, found without running anybody's code.

A slot is a holder and a key: an instance's dictionary and an attribute's name, a dictionary or list and an item's key,
a closure cell, an object with ``__slots__`` and a name, a class's dictionary and a name. Properties are not slots: they
are functions, and whatever they read is a slot of its own.
"""

from __future__ import annotations

import collections
import contextvars
import os
import threading
import types
from dataclasses import dataclass
from typing import Any

from torch import nn


class _Absent:
    """Marks a slot that holds nothing."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()

CELL = "cell_contents"
"""The key of a closure cell's only slot."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One slot. `label` is what a reader calls it: ``CFG.kl``, ``weights[0]``, ``self.cfg.loss.kl``.

    Holders: dict, list, tuple, deque, cell, class (its own dictionary, not its bases'), `contextvars.ContextVar`,
    `os.environ`, or an object whose class declares `key` in ``__slots__``.
    """

    holder: Any
    key: Any
    label: str

    @property
    def identity(self) -> tuple[int, Any]:
        """The same for two slots that are one."""
        return id(self.holder), self.key

    def value(self) -> Any:
        """The present value, or ABSENT."""
        holder = self.holder
        try:
            if isinstance(holder, types.CellType):
                return holder.cell_contents
            if isinstance(holder, contextvars.ContextVar):
                return holder.get()
            if isinstance(holder, type):
                return class_dict(holder)[self.key]
            if isinstance(holder, dict):
                return dict.get(holder, self.key, ABSENT)  # a defaultdict's [] would write
            if isinstance(holder, (list, tuple, collections.deque, type(os.environ))):
                return holder[self.key]
            descriptor = declared(type(holder), self.key)
            return descriptor.__get__(holder) if isinstance(descriptor, types.MemberDescriptorType) else ABSENT
        except (LookupError, ValueError, AttributeError, TypeError):
            return ABSENT


def instance_dict(value: Any) -> dict[str, Any] | None:
    """`value`'s own ``__dict__``, or None. Ignores what a class makes of the name."""
    try:
        # A thread-local object's dictionary is another in each thread; only its own class knows which.
        found = value.__dict__ if isinstance(value, threading.local) else object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def class_dict(kind: type) -> types.MappingProxyType[str, Any]:
    """`kind`'s own dictionary. A metaclass has no say."""
    found: types.MappingProxyType[str, Any] = type.__dict__["__dict__"].__get__(kind)
    return found


def declaring(kind: type, name: str) -> type | None:
    """The class along `kind`'s method resolution order whose dictionary has `name`."""
    return next((owner for owner in type.__dict__["__mro__"].__get__(kind) if name in class_dict(owner)), None)


def declared(kind: type, name: str) -> Any:
    """The raw class attribute `name` of `kind`, unbound, or ABSENT."""
    owner = declaring(kind, name)
    return ABSENT if owner is None else class_dict(owner)[name]


def attribute_slots(value: Any, name: str, label: str) -> list[Slot]:
    """The slots that ``value.name`` depends on. The last one holds the value; those before it hold nothing, and would
    come first if they did.

    Empty where the value is computed: a property, ``__getattr__``.
    """
    full = f"{label}.{name}"
    if isinstance(value, types.ModuleType):
        return [Slot(vars(value), name, full)]
    if isinstance(value, type):
        owner = declaring(value, name) or declaring(type(value), name)
        return [] if owner is None else [Slot(owner, name, full)]
    raw, own = declared(type(value), name), instance_dict(value)
    if isinstance(raw, types.MemberDescriptorType):
        return [Slot(value, name, full)]
    if raw is not ABSENT and hasattr(type(raw), "__set__"):
        return []  # a property, or a descriptor like one
    if own is not None and name in own:
        return [Slot(own, name, full)]
    shadows = [] if own is None else [Slot(own, name, full)]
    if raw is not ABSENT:
        owner = declaring(type(value), name)
        assert owner is not None
        return [*shadows, Slot(owner, name, f"{owner.__qualname__}.{name}")]
    if isinstance(value, nn.Module) and own is not None:
        for part in ("_parameters", "_buffers", "_modules"):
            if name in own.get(part, ()):
                return [Slot(own[part], name, full)]
    return shadows


def item_slot(value: Any, key: Any, label: str) -> Slot | None:
    """The slot of ``value[key]``, or None where a class computes it."""
    full = f"{label}[{key!r}]"
    if isinstance(value, (dict, list, tuple, collections.deque)):
        plain = declared(type(value), "__getitem__") in (kind.__dict__["__getitem__"] for kind in _CONTAINERS)
        return Slot(value, key, full) if plain else None
    if value is os.environ:
        return Slot(value, key, full)
    if isinstance(value, (nn.Sequential, nn.ModuleList)) and isinstance(key, int):
        children = value.__dict__["_modules"]
        return Slot(children, str(key % len(children)), full) if -len(children) <= key < len(children) else None
    if isinstance(value, nn.ModuleDict):
        return Slot(value.__dict__["_modules"], key, full)
    return None


_CONTAINERS: tuple[type, ...] = (dict, list, tuple, collections.deque)
