"""Where Python keeps values. Holders are read and put back in place, by content, without a call of user code.

A dictionary, list, deque or set is read by the methods of the built-in type, whatever a subclass overrides. Two user
methods may run: ``__hash__`` and ``__eq__`` of a key or element, when a dictionary or set gets it back.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import types
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fusion_compile._capture.rehearsal._compat import TENSOR_HOOKS


class _Sentinel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


MISSING: Any = _Sentinel("nothing")
"""Stands for the value of a slot that does not exist: no such key, an empty closure cell."""
WHOLE: Any = _Sentinel("the whole content")
"""The key of all that a list, deque, set or dictionary holds."""


class Slot(NamedTuple):
    """Where Python keeps one value. `key`: an attribute's or global's name, a dictionary key, an index, a slot
    descriptor of a class with ``__slots__``, None for a closure cell, or `WHOLE`. `label`: ``"model.1.cache[5]"``."""

    holder: Any
    key: Any
    label: str

    @property
    def identity(self) -> tuple[int, Any]:
        """Equal for two slots that are the same."""
        return id(self.holder), key_identity(self.key)


class HolderKind(enum.Enum):
    """How a holder's slots are read and written."""

    DICT = enum.auto()
    LIST = enum.auto()
    DEQUE = enum.auto()
    SET = enum.auto()
    CELL = enum.auto()
    NAMES = enum.auto()  # some keys of a dictionary: the globals that functions name
    CLASS = enum.auto()
    DESCRIPTORS = enum.auto()  # an object with __slots__
    TENSOR = enum.auto()  # .grad and the hooks of a tensor
    FUNCTION = enum.auto()  # default arguments
    CONTEXT = enum.auto()  # a ContextVar


_WHOLE_KINDS = (HolderKind.LIST, HolderKind.DEQUE, HolderKind.SET)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
Items = list[tuple[Any, Any]]


class Holder(NamedTuple):
    """An object whose slots are known. `keys`: those that count, where not all do. `attributes`: whether a key is
    written ``label.key`` in a label, and not ``label[key]``."""

    value: Any
    kind: HolderKind
    label: str
    keys: tuple[Any, ...] = ()
    attributes: bool = False

    def label_of(self, key: Any) -> str:
        """``model.1.cache`` or ``model.table[5]``; a key that is not plain is named by its type."""
        if key is WHOLE or self.kind is HolderKind.CELL or self.kind is HolderKind.CONTEXT:
            return self.label
        if isinstance(key, types.MemberDescriptorType):
            return f"{self.label}.{key.__name__}"
        if self.attributes:
            return f"{self.label}.{key}" if self.label else str(key)
        return f"{self.label}[{named_key(key)}]"

    @property
    def is_sequence(self) -> bool:
        """Whether what changes its length is reported as one change of the whole."""
        return self.kind in _WHOLE_KINDS

    def items(self) -> Items:
        """``(key, value)`` of every slot that exists, or that counts; the elements of a set are keys and values."""
        value, kind = self.value, self.kind
        if kind is HolderKind.DICT:
            pairs = list(dict.items(value))
            if pairs and issubclass(type(value), collections.OrderedDict):  # its order is its own
                by_key = {id(key): (key, inner) for key, inner in pairs}
                pairs = [by_key[id(key)] for key in collections.OrderedDict.__iter__(value)]
            return pairs
        if kind is HolderKind.LIST:
            return list(enumerate(list.__getitem__(value, slice(None))))
        if kind is HolderKind.DEQUE:
            return list(enumerate(collections.deque.__iter__(value)))
        if kind is HolderKind.SET:
            return [(element, element) for element in set.__iter__(value)]
        if kind is HolderKind.CELL or kind is HolderKind.CONTEXT:
            return [(None, read(Slot(value, None, "")))]
        return [(key, read(Slot(value, key, ""))) for key in self.keys]

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
            _refill(self.value, self.kind, [value for _, value in items])
        elif self.kind is HolderKind.DICT:
            _put_into_dict(self.value, now, items)
        else:
            for key, value in items:
                if read(Slot(self.value, key, "")) is not value:
                    write(Slot(self.value, key, ""), value)


def read(slot: Slot) -> Any:
    """The value in `slot`, or `MISSING`; for the key `WHOLE` a list of all values."""
    holder, key = slot.holder, slot.key
    if key is WHOLE:
        return [value for _, value in Holder(holder, _container_kind(holder), "").items()]
    if isinstance(key, types.MemberDescriptorType):
        try:
            return key.__get__(holder, type(holder))
        except AttributeError:
            return MISSING
    kind = type(holder)
    if kind is types.CellType:
        try:
            return holder.cell_contents
        except ValueError:
            return MISSING
    if kind is contextvars.ContextVar:
        return holder.get(MISSING)
    if issubclass(kind, dict):
        return dict.get(holder, key, MISSING)
    if issubclass(kind, (list, collections.deque)):
        own: Any = list if issubclass(kind, list) else collections.deque
        return own.__getitem__(holder, key) if key < own.__len__(holder) else MISSING
    if issubclass(kind, type):
        return vars(holder).get(key, MISSING)
    if key == "grad" and not holder.is_leaf:
        return None  # torch warns of asking
    value = getattr(holder, key)  # .grad and the hooks of a tensor, the default arguments of a function
    return None if key in TENSOR_HOOKS and not value else value


def write(slot: Slot, value: Any) -> None:
    """Put `value` into `slot`; `MISSING` takes the slot away."""
    holder, key = slot.holder, slot.key
    kind = type(holder)
    if key is WHOLE:
        _refill(holder, _container_kind(holder), value)
    elif isinstance(key, types.MemberDescriptorType):
        key.__delete__(holder) if value is MISSING else key.__set__(holder, value)
    elif kind is types.CellType:
        if value is MISSING:
            del holder.cell_contents
        else:
            holder.cell_contents = value
    elif kind is contextvars.ContextVar:
        if value is not MISSING:
            holder.set(value)
    elif issubclass(kind, dict):
        own = _dict_type(kind)
        own.pop(holder, key, None) if value is MISSING else own.__setitem__(holder, key, value)
    elif issubclass(kind, list):
        list.__setitem__(holder, key, value)
    elif issubclass(kind, collections.deque):
        collections.deque.__setitem__(holder, key, value)
    elif issubclass(kind, type):
        type.__delattr__(holder, key) if value is MISSING else type.__setattr__(holder, key, value)
    elif issubclass(kind, Tensor) and key in TENSOR_HOOKS and value is None:
        getattr(holder, key).clear()  # torch has installed the dictionary for good
    else:
        setattr(holder, key, value)


def key_identity(key: Any) -> Any:
    """A hashable stand-in for `key` that does not call a user's ``__hash__``."""
    return (type(key), key) if type(key) in _PLAIN else id(key)


def named_key(key: Any) -> str:
    """A plain key, or a tuple of such, as code writes it; another one as ``<its type>``."""
    if type(key) in _PLAIN:
        return repr(key)
    if type(key) is tuple:
        return f"({', '.join(map(named_key, key))})"
    return f"<{type(key).__name__}>"


def is_same_content(a: Items, b: Items) -> bool:
    """Whether two readings of one holder have identical keys and values in the same order."""
    return len(a) == len(b) and all(
        v is w and (k is j or key_identity(k) == key_identity(j)) for (k, v), (j, w) in zip(a, b, strict=True)
    )


def _container_kind(holder: Any) -> HolderKind:
    kinds = {list: HolderKind.LIST, collections.deque: HolderKind.DEQUE, set: HolderKind.SET, dict: HolderKind.DICT}
    return next(kind for base, kind in kinds.items() if issubclass(type(holder), base))


def _dict_type(kind: type) -> Any:
    """An OrderedDict keeps its order beside the dictionary, so that only its own methods may write it."""
    return collections.OrderedDict if issubclass(kind, collections.OrderedDict) else dict


def _refill(holder: Any, kind: HolderKind, values: Iterable[Any]) -> None:
    if kind is HolderKind.LIST:
        list.__setitem__(holder, slice(None), list(values))
    elif kind is HolderKind.DEQUE:
        collections.deque.clear(holder)
        collections.deque.extend(holder, values)
    elif kind is HolderKind.SET:
        set.clear(holder)
        set.update(holder, values)
    else:
        raise AssertionError(f"A {kind.name} has keys and is not filled with values alone.")


def _put_into_dict(holder: Any, now: Items, items: Items) -> None:
    own = _dict_type(type(holder))
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
