"""A slot, where Python keeps one value: found, read and written without a call of user code.

A slot is a holder and a key: an instance's dictionary and an attribute's name, a dictionary or list and an item's key,
a closure cell, an object with ``__slots__`` and one of its descriptors, a class and a name. Properties are not slots:
they are functions, and whatever they read is a slot of its own.

Containers are read and written by the methods of the built-in type, whatever a subclass overrides. Two user methods may
run: ``__hash__`` and ``__eq__`` of a key or element, when a dictionary or set gets it back.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import os
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fusion_compile._capture.python_state._compat import TENSOR_HOOKS


class _Sentinel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


MISSING: Any = _Sentinel("nothing")
"""Stands for the value of a slot that does not exist: no such key, an empty closure cell."""
WHOLE: Any = _Sentinel("the whole content")
"""The key of all that a list, deque, set or dictionary holds."""

_PLAIN_KEYS = (type(None), bool, int, float, complex, str, bytes)
_ENVIRON = type(os.environ)


class Inside:
    """The holder of what lies inside of a value that can only be replaced as a whole: the number in a tuple."""

    def read(self, key: Any) -> Any:
        """What lies at `key`, or `MISSING`."""
        raise NotImplementedError

    def write(self, key: Any, value: Any) -> None:
        """Put a value around `value` into the place of the whole."""
        raise NotImplementedError


class Slot(NamedTuple):
    """Where Python keeps one value. `label` is what a reader calls it: ``"model.1.cache[5]"``, ``"CFG.kl"``.

    `key`: an attribute's or global's name, a dictionary key, an index, a slot descriptor of a class with ``__slots__``,
    None for a closure cell or a context variable, or `WHOLE`.
    """

    holder: Any
    key: Any
    label: str

    @property
    def identity(self) -> tuple[int, Any]:
        """Equal for two slots that are the same."""
        return id(self.holder), key_identity(self.key)


def read(slot: Slot) -> Any:
    """The value in `slot`, or `MISSING`; for the key `WHOLE` a list of all values."""
    holder, key, _ = slot
    if key is WHOLE:
        return values_in(holder)
    if isinstance(holder, Inside):
        return holder.read(key)
    kind = type(holder)
    try:
        if type(key) is types.MemberDescriptorType:
            return key.__get__(holder, kind)
        if issubclass(kind, dict):
            return dict.get(holder, key, MISSING)  # a defaultdict's [] would write
        if kind is types.CellType:
            return holder.cell_contents
        if issubclass(kind, (list, tuple, collections.deque)):
            return built_in(kind).__getitem__(holder, key)
        if kind is contextvars.ContextVar:
            return holder.get(MISSING)
        if kind is _ENVIRON:
            return holder[key]
        if issubclass(kind, type):
            return class_dict(holder).get(key, MISSING)
    except (LookupError, ValueError, AttributeError, TypeError):
        return MISSING
    if key == "__class__":
        return kind
    if key == "grad" and not holder.is_leaf:
        return None  # torch warns of asking
    value = getattr(holder, key, MISSING)  # .grad and the hooks of a tensor, the default arguments of a function
    return None if key in TENSOR_HOOKS and not value else value


def write(slot: Slot, value: Any) -> None:
    """Put `value` into `slot`; `MISSING` takes the slot away."""
    holder, key, _ = slot
    kind = type(holder)
    if key is WHOLE:
        refill(holder, value)
    elif isinstance(holder, Inside):
        holder.write(key, value)
    elif type(key) is types.MemberDescriptorType:
        key.__delete__(holder) if value is MISSING else key.__set__(holder, value)
    elif kind is types.CellType:
        if value is MISSING:
            del holder.cell_contents
        else:
            holder.cell_contents = value
    elif kind is contextvars.ContextVar:
        if value is not MISSING:
            holder.set(value)
    elif issubclass(kind, dict) and value is MISSING:
        built_in(kind).pop(holder, key, None)
    elif issubclass(kind, (dict, list, collections.deque)):
        built_in(kind).__setitem__(holder, key, value)
    elif issubclass(kind, type):
        type.__delattr__(holder, key) if value is MISSING else type.__setattr__(holder, key, value)
    elif issubclass(kind, Tensor) and key in TENSOR_HOOKS and value is None:
        getattr(holder, key).clear()  # torch has installed the dictionary for good
    else:
        setattr(holder, key, value)


@contextlib.contextmanager
def slots_kept(slots: Sequence[Slot]) -> Iterator[list[Any]]:
    """Yield the values of `slots`; at the end they hold these very objects again."""
    values = [read(slot) for slot in slots]
    try:
        yield values
    finally:
        for slot, value in zip(slots, values, strict=True):
            with contextlib.suppress(IndexError):  # a list that became shorter is its owner's to restore
                write(slot, value)


def values_in(container: Any) -> list[Any]:
    """All that a dictionary, list, tuple, deque or set holds, in its order; of a dictionary the values."""
    own = built_in(type(container))
    return list(own.values(container) if issubclass(own, dict) else own.__iter__(container))


def refill(container: Any, values: Iterable[Any]) -> None:
    """Make `values` all that a list, deque or set holds, in place."""
    own = built_in(type(container))
    if own is list:
        list.__setitem__(container, slice(None), list(values))
    elif own is collections.deque or own is set:
        own.clear(container)
        getattr(own, "update" if own is set else "extend")(container, values)
    else:
        raise AssertionError(f"A {own.__name__} has keys, or never changes: it is not filled with values alone.")


_BUILT_IN: tuple[type, ...] = (
    collections.OrderedDict,  # keeps its order beside the dictionary, so that only its own methods may write it
    *(dict, list, tuple, collections.deque, set, frozenset),
)


def built_in(kind: type) -> Any:
    """The built-in container that the class `kind` is or derives from; its methods are those to call."""
    return next(base for base in _BUILT_IN if issubclass(kind, base))


def class_dict(kind: type) -> types.MappingProxyType[str, Any]:
    """`kind`'s own dictionary. A metaclass has no say."""
    found: types.MappingProxyType[str, Any] = type.__dict__["__dict__"].__get__(kind)
    return found


def key_identity(key: Any) -> Any:
    """A hashable stand-in for `key` that does not call a user's ``__hash__``."""
    return (type(key), key) if type(key) in _PLAIN_KEYS else id(key)


def named_key(key: Any) -> str:
    """A plain key, or a tuple of such, as code writes it; another one as ``<its type>``."""
    if type(key) in _PLAIN_KEYS:
        return repr(key)
    if type(key) is tuple:
        return f"({', '.join(map(named_key, key))})"
    return f"<{type(key).__name__}>"
