"""Reading and writing a slot: a key of a dictionary or list, a closure cell, an attribute of an object or class."""

from __future__ import annotations

import contextlib
import enum
import types
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any


def read_slot(holder: Any, key: Any) -> Any:
    """The value that lies at `key` in `holder`; a closure cell has one value, whatever the key.

    Raises:
        KeyError, IndexError, AttributeError, ValueError: nothing lies there.
    """
    if isinstance(holder, types.CellType):
        return holder.cell_contents
    if isinstance(holder, (Mapping, Sequence)):
        return holder[key]
    own = getattr(holder, "__dict__", {})
    return own[key] if key in own or isinstance(holder, type) else object.__getattribute__(holder, key)


def write_slot(holder: Any, key: Any, value: Any) -> None:
    """Put `value` where `read_slot` reads it."""
    if isinstance(holder, types.CellType):
        holder.cell_contents = value
    elif isinstance(holder, (MutableMapping, MutableSequence)):
        holder[key] = value
    elif isinstance(holder, type):
        setattr(holder, key, value)
    elif key in getattr(holder, "__dict__", {}):
        vars(holder)[key] = value
    else:
        object.__setattr__(holder, key, value)  # a slot of a frozen class too: it gets back what it held


@contextlib.contextmanager
def slots_kept(slots: Sequence[tuple[Any, Any]]) -> Iterator[list[Any]]:
    """Yield the values of `slots`; at the end they hold these very objects again."""
    values = [read_slot(holder, key) for holder, key in slots]
    try:
        yield values
    finally:
        for (holder, key), value in zip(slots, values, strict=True):
            with contextlib.suppress(IndexError):  # a list that became shorter is its owner's to restore
                write_slot(holder, key, value)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None or a member of an enum: it has no parts and never changes."""
    return type(value) in (int, float, bool, str, bytes, type(None)) or isinstance(value, enum.Enum)
