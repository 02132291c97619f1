"""What a slot of carried state may hold: tensors and plain values in containers, taken apart and put together again."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._capture.python_state.slots import MISSING, Inside, Slot, read, write

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_FIXED = (enum.Enum, type, types.FunctionType, types.BuiltinFunctionType)
"""Values that are themselves: they do not change from step to step."""

Parts = list[tuple[str, Any]]


class _Shape(NamedTuple):
    """A value without its tensors: containers, plain values, and a tensor's shape, dtype and device."""

    kind: Any
    inner: tuple[Any, ...] = ()


Own = Mapping[int, Tensor]
"""By identity, the model's parameters and what stands for them: they are no state, and stay themselves."""
_NONE: Own = {}


def _parts(value: Any) -> Parts | None:
    """``(step of the path, inner value)`` of a container; None for what has no parts here."""
    if isinstance(value, (list, tuple, collections.deque)):
        return [(f"[{i}]", inner) for i, inner in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{key!r}]", inner) for key, inner in value.items()]
    if type(value) is functools.partial:
        return [*_parts(value.args), *_parts(value.keywords)]  # type: ignore[misc]
    if type(value) is types.SimpleNamespace:
        return _parts(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f"[{field.name!r}]", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _rebuilt(value: Any, inner: list[Any]) -> Any:
    """A container like `value` around other parts, in the order of `_parts`."""
    if isinstance(value, collections.deque):
        return type(value)(inner, value.maxlen)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*inner)
    if isinstance(value, (list, tuple)):
        return type(value)(inner)
    if type(value) is functools.partial:
        names = dict(zip(value.keywords, inner[len(value.args) :], strict=True))
        return functools.partial(value.func, *inner[: len(value.args)], **names)
    if type(value) is types.SimpleNamespace:
        return types.SimpleNamespace(**dict(zip(vars(value), inner, strict=True)))
    new = copy.copy(value)  # a dictionary with its default factory; a dataclass with what is no field
    if isinstance(value, dict):
        for key, each in zip(value, inner, strict=True):
            new[key] = each
    else:
        for field, each in zip(dataclasses.fields(value), inner, strict=True):
            object.__setattr__(new, field.name, each)  # frozen ones, too
    return new


Key = tuple[str, ...]
"""Where something lies inside of a value: the steps of its path."""


class PartOf(Inside):
    """The parts of the value in `slot`, by `Key`."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def read(self, key: Key) -> Any:
        """The part at `key`, or `MISSING`."""
        return part(read(self.slot), key)

    def write(self, key: Key, value: Any) -> None:
        """Put a copy of the whole with another part into the slot."""
        write(self.slot, with_part(read(self.slot), key, value))


def part(value: Any, key: Key) -> Any:
    """What lies at `key` in `value`, or `MISSING`."""
    for step in key:
        value = dict(_parts(value) or ()).get(step, MISSING)
    return value


def with_part(value: Any, key: Key, new: Any) -> Any:
    """A copy of `value` with `new` at `key`; `value` where it has no such part."""
    if not key:
        return new
    parts = _parts(value)
    if parts is None or key[0] not in dict(parts):
        return value
    return _rebuilt(value, [with_part(v, key[1:], new) if step == key[0] else v for step, v in parts])


def numbers_in(value: Any, key: Key = ()) -> dict[Key, int | float]:
    """Plain ints and floats inside of containers."""
    if type(value) in (int, float):
        return {key: value}
    found: dict[Key, int | float] = {}
    for step, inner in _parts(value) or ():
        found |= numbers_in(inner, (*key, step))
    return found


def changing_numbers(slot: Slot, values: Sequence[Any]) -> list[Slot]:
    """Slots for the plain numbers in a container that are not the same in all `values`, which are alike otherwise."""
    try:
        shapes = {shape_of(value, numbers=False) for value in values}
    except TypeError:
        return []
    if len(shapes) != 1 or _parts(values[0]) is None:
        return []
    holder, found = PartOf(slot), [numbers_in(value) for value in values]
    keys = [key for key in found[0] if any(one[key] != found[0][key] for one in found)]
    return [Slot(holder, key, slot.label + "".join(key)) for key in keys]


class _Counted(enum.Enum):
    NUMBER = "counted"


COUNTED = _Counted.NUMBER
"""In a form, in the place of a number that is counted on."""


def shape_of(value: Any, own: Own = _NONE, *, numbers: bool = True) -> Hashable:
    """What a program is specialised on: equal for two values that hold tensors of one shape and dtype in one structure.

    `numbers`: whether plain ints and floats must be equal, too.

    Raises TypeError for a value that holds anything but tensors and plain values in containers: lists, tuples,
    NamedTuples, deques, dictionaries, dataclasses, namespaces and partials.
    """
    if isinstance(value, Tensor):
        if id(value) in own:
            return _Shape("own", (id(own[id(value)]),))
        return _Shape("tensor", (tuple(value.shape), value.dtype, value.device))
    if type(value) in (int, float) and not numbers:
        return _Shape(type(value))
    if value is MISSING or type(value) in _PLAIN or isinstance(value, _FIXED):
        return _Shape(type(value), (value,))
    parts = _parts(value)
    if parts is None:
        raise TypeError(type(value).__name__)
    called = value.func if type(value) is functools.partial else None
    return _Shape((type(value), called), tuple((step, shape_of(inner, own, numbers=numbers)) for step, inner in parts))


def tensors_in(value: Any, path: str, own: Own = _NONE) -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` of every tensor in nested containers, apart from `own`."""
    if isinstance(value, Tensor):
        if id(value) not in own:
            yield path, value
    else:
        for step, inner in _parts(value) or ():
            yield from tensors_in(inner, path + step, own)


class Place(NamedTuple):
    """Stands for a tensor in a form: where it lies."""

    path: str


def form_of(value: Any, path: str, own: Own = _NONE) -> Any:
    """`value` without its tensors, which would keep memory alive, or have none: containers, plain values and paths. The
    model's own stay."""
    if isinstance(value, Tensor):
        return own.get(id(value), Place(path))
    parts = _parts(value)
    if parts is None or isinstance(value, Place):
        return value
    return _rebuilt(value, [form_of(inner, path + step, own) for step, inner in parts])


def filled(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of that `form` with `tensors` (by path) in it."""
    if isinstance(form, Place):
        return tensors[form.path]
    parts = _parts(form)
    if parts is None:
        return form
    return _rebuilt(form, [filled(inner, tensors) for _, inner in parts])
