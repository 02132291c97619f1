"""Which slots an attribute or an item of an object depends on, found without running anybody's code."""

from __future__ import annotations

import collections
import os
import threading
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from fusion_compile._capture.python_state.slots import MISSING, Slot, built_in, class_dict

_DICTIONARY_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)


def instance_dict(value: Any) -> dict[str, Any] | None:
    """The dictionary of `value`'s attributes, or None. Ignores what a class makes of the name."""
    if threading.local in type(value).__mro__:  # this thread's, which no descriptor gives
        return threading.local.__getattribute__(value, "__dict__")  # type: ignore[no-any-return]
    descriptor = _dictionary_descriptor(type(value))
    found = None if descriptor is None else descriptor.__get__(value)
    return found if isinstance(found, dict) else None


def set_instance_dict(value: Any, attributes: dict[str, Any]) -> None:
    """Give `value` the dictionary that it had before somebody wrote ``self.__dict__ = …``."""
    descriptor = _dictionary_descriptor(type(value))
    if descriptor is not None:
        descriptor.__set__(value, attributes)


def _dictionary_descriptor(kind: type) -> Any:
    entries = (class_dict(base).get("__dict__") for base in kind.__mro__)
    return next((entry for entry in entries if isinstance(entry, _DICTIONARY_DESCRIPTORS)), None)


def slot_descriptors(kind: type) -> Iterator[types.MemberDescriptorType]:
    """What `kind` and its bases declare in ``__slots__``."""
    for base in kind.__mro__:
        if "__slots__" in class_dict(base):
            yield from (entry for entry in class_dict(base).values() if isinstance(entry, types.MemberDescriptorType))


def declaring(kind: type, name: str) -> type | None:
    """The class along `kind`'s method resolution order whose dictionary has `name`."""
    return next((owner for owner in type.__dict__["__mro__"].__get__(kind) if name in class_dict(owner)), None)


def declared(kind: type, name: str) -> Any:
    """The raw class attribute `name` of `kind`, unbound, or MISSING."""
    owner = declaring(kind, name)
    return MISSING if owner is None else class_dict(owner)[name]


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
        return [Slot(value, raw, full)]
    if raw is not MISSING and hasattr(type(raw), "__set__"):
        return []  # a property, or a descriptor like one
    if own is not None and name in own:
        return [Slot(own, name, full)]
    shadows = [] if own is None else [Slot(own, name, full)]
    if raw is not MISSING:
        owner = declaring(type(value), name)
        assert owner is not None
        return [*shadows, Slot(owner, name, f"{owner.__qualname__}.{name}")]
    if isinstance(value, nn.Module) and own is not None:
        for part in ("_parameters", "_buffers", "_modules"):
            if name in own.get(part, ()):
                return [Slot(own[part], name, full)]
    return shadows


def item_slot(value: Any, key: Any, label: str) -> Slot | None:
    """The slot of ``value[key]``, or None where a class computes it, and for a slice."""
    full = f"{label}[{key!r}]"
    if isinstance(key, slice):
        return None
    if isinstance(value, (dict, list, tuple, collections.deque)):
        plain = declared(type(value), "__getitem__") is declared(built_in(type(value)), "__getitem__")
        return Slot(value, key, full) if plain else None
    if value is os.environ:
        return Slot(value, key, full)
    if isinstance(value, (nn.Sequential, nn.ModuleList)) and isinstance(key, int):
        children = value.__dict__["_modules"]
        return Slot(children, str(key % len(children)), full) if -len(children) <= key < len(children) else None
    if isinstance(value, nn.ModuleDict):
        return Slot(value.__dict__["_modules"], key, full)
    return None
