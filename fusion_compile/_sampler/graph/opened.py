"""Objects among a call's arguments and results, taken apart into dictionaries so that their tensors are seen.

To torch's trees a dataclass, a cache of keys and values, transformers' BatchEncoding or a dictionary of a class of its
own is one leaf: its tensors would be constants of a trace, and a program would serve the next call with the former
one's. `opened` puts a dictionary with everything that it holds in its place, and `closed` makes an object of the same
class from that again.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile.passes._compat import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

MOST_DEEP = 20
"""Objects within objects that are taken apart; what lies deeper is one leaf."""

PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, set, frozenset, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Kinds of leaves that are told apart by their values."""
CODE = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial),
    *(property, staticmethod, classmethod),
)
"""Kinds of leaves that are told apart by their identity: a program is specialised on the code itself."""
_WHOLE = (Tensor, nn.Module, torch.Generator, *PLAIN, *CODE)
_CONTAINERS = (dict, list, tuple)


@dataclass(frozen=True)
class _Kind:
    """The first key of a dictionary that stands for an object of class `cls`.

    The others are ``("item", key)``, ``("attribute", name)`` and ``("slot", name)``.
    """

    cls: type


def opened(value: Any) -> Any:
    """`value` with a dictionary in place of every object that has attributes or items of its own.

    A value without objects is returned as it is.
    """
    return _open(value, ())


def closed(value: Any) -> Any:
    """`value`, as `opened` gives it, with new objects of the same classes in place of their dictionaries."""
    if type(value) is dict:
        kind, *_ = value or (None,)
        if isinstance(kind, _Kind):
            return _made(kind.cls, {key: closed(part) for key, part in value.items() if key is not kind})
    if not any(map(_is_open, _dictionaries(value))):
        return value
    return tree_map(closed, value, is_leaf=lambda part: part is not value)


def holds_objects(value: Any) -> bool:
    """Whether `opened` would change `value`."""
    return any(map(_can_be_opened, tree_leaves(value)))


def unknown_leaves(value: Any) -> Iterator[Any]:
    """The leaves of an opened `value` that are neither tensors nor told apart by value or identity."""
    for leaf in tree_leaves(value):
        if not isinstance(leaf, (Tensor, *PLAIN, *CODE)) and not _is_array(leaf):
            yield leaf


def identity_of(leaf: Any) -> Any:
    """What is equal for two leaves that are the same constant: the value itself, the bytes of an array, or the id."""
    if _is_array(leaf):
        return leaf.shape, str(leaf.dtype), leaf.tobytes()
    if isinstance(leaf, slice):
        return leaf.start, leaf.stop, leaf.step
    if isinstance(leaf, set):
        return frozenset(leaf)
    return leaf if isinstance(leaf, PLAIN) else id(leaf)


@dataclass(frozen=True)
class Output:
    """The form of a model's output: the structure of what `opened` gives of it, and the leaves that are no tensors.

    `constants`: place among the leaves -> value. `unknown`: the class of a leaf of which nothing is known, or None.
    """

    structure: TreeSpec
    constants: dict[int, Any]
    unknown: type | None

    @staticmethod
    def of(output: Any) -> tuple[list[Tensor], Output]:
        """The tensors of `output`, and its form."""
        as_it_is = opened(output)
        leaves, structure = tree_flatten(as_it_is)
        constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        unknown = next((type(leaf) for leaf in unknown_leaves(as_it_is)), None)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Output(structure, constants, unknown)

    @property
    def n_tensors(self) -> int:
        """How many of the leaves are tensors."""
        return self.structure.num_leaves - len(self.constants)

    def made_of(self, tensors: Iterable[Tensor]) -> Any:
        """The model's output with these `tensors`."""
        fresh = iter(tensors)
        places = range(self.structure.num_leaves)
        leaves = [self.constants[i] if i in self.constants else next(fresh) for i in places]
        return closed(tree_unflatten(leaves, self.structure))


class Before:
    """What lies in `arguments` before a forward that gets them, to see afterwards what it did to them."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._items = {name: _items(value) for name, value in arguments.items()}
        self._forms = {
            name: {key: tree_flatten(opened(item)) for key, item in items} for name, items in self._items.items()
        }

    def written(self, arguments: Mapping[str, Any]) -> str | None:
        """The first of `arguments` in which something else lies now, or None; what was taken out does not count."""
        for name, value in arguments.items():
            kept = self._kept(name, value)
            if kept is None:
                return name
            for (_, item), key in zip(_items(value), kept, strict=True):
                leaves, structure = self._forms[name][key]
                now, form = tree_flatten(opened(item))
                if form != structure or not all(map(_is_same, leaves, now)):
                    return name
        return None

    def taken_out(self, arguments: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """The lists and dictionaries among `arguments` that lost items, each with the indices or keys that are left."""
        kept = {name: self._kept(name, value) or () for name, value in arguments.items()}
        return {name: keys for name, keys in kept.items() if len(keys) < len(self._items[name])}

    def _kept(self, name: str, value: Any) -> tuple[Any, ...] | None:
        """Where the items of `value` were before; None if one was not there, or later than the next."""
        before, kept = iter(self._items[name]), []
        for key, item in _items(value):
            found = next((k for k, former in before if former is item and (k == key or isinstance(value, list))), None)
            if found is None and key is not None:
                return None
            kept.append(found)
        return tuple(kept)


def take_out(given: Mapping[str, Any], kept: Mapping[str, tuple[Any, ...]]) -> None:
    """Take out of the caller's lists and dictionaries what the model would, as `Before.taken_out` says."""
    for name, keys in kept.items():
        container = given[name]
        if isinstance(container, list):
            container[:] = [container[i] for i in keys]
        else:
            for key in [key for key in container if key not in keys]:
                del container[key]


def _items(value: Any) -> list[tuple[Any, Any]]:
    if type(value) is list:
        return [*enumerate(value)]
    return [*value.items()] if type(value) is dict else [(None, value)]


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, Tensor) and identity_of(one) == identity_of(other))


def _is_array(leaf: Any) -> bool:
    """numpy's, and its numbers; numpy itself is not imported here."""
    return type(leaf).__module__ == "numpy" and hasattr(leaf, "tobytes") and getattr(leaf, "dtype", None) is not None


def _open(value: Any, outer: tuple[int, ...]) -> Any:
    if not holds_objects(value):
        return value

    def open_leaf(leaf: Any) -> Any:
        if not _can_be_opened(leaf) or id(leaf) in outer or len(outer) >= MOST_DEEP:
            return leaf
        within = (*outer, id(leaf))
        return {_Kind(type(leaf)): None, **{key: _open(part, within) for key, part in _parts(leaf)}}

    return tree_map(open_leaf, value)


def _can_be_opened(leaf: Any) -> bool:
    if isinstance(leaf, _WHOLE) or _is_array(leaf):
        return False
    return isinstance(leaf, _CONTAINERS) or hasattr(leaf, "__dict__") or bool(_slots(leaf))


def _parts(value: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    if isinstance(value, dict):
        plain = OrderedDict if isinstance(value, OrderedDict) else dict  # not what the class makes of it
        yield from ((("item", key), part) for key, part in plain.items(value))
    elif isinstance(value, (list, tuple)):
        yield from ((("item", i), part) for i, part in enumerate(value))
    yield from ((("attribute", name), part) for name, part in getattr(value, "__dict__", {}).items())
    yield from ((("slot", name), getattr(value, name)) for name in _slots(value))


def _slots(value: Any) -> list[str]:
    names = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _made(cls: type, parts: dict[tuple[str, Any], Any]) -> Any:
    """An object of `cls` with these parts; its ``__init__`` does not run."""
    items = {key: part for (how, key), part in parts.items() if how == "item"}
    made: Any
    if issubclass(cls, tuple):
        made = tuple.__new__(cls, items.values())
    else:
        made = cls.__new__(cls)
    if issubclass(cls, dict):
        plain = OrderedDict if issubclass(cls, OrderedDict) else dict
        for key, part in items.items():
            plain.__setitem__(made, key, part)
    elif issubclass(cls, list):
        list.extend(made, items.values())
    for (how, name), part in parts.items():
        if how == "attribute":
            made.__dict__[name] = part
        elif how == "slot":
            object.__setattr__(made, name, part)  # frozen ones, too
    return made


def _is_open(part: dict[Any, Any]) -> bool:
    return isinstance(next(iter(part), None), _Kind)


def _dictionaries(value: Any) -> Iterator[dict[Any, Any]]:
    """Every plain dictionary in `value`."""
    found: list[dict[Any, Any]] = []

    def look(part: Any) -> bool:
        if type(part) is dict:
            found.append(part)
        return False

    tree_leaves(value, is_leaf=look)
    yield from found
