"""Iterators that a run moves on: where they stand, and how they get back there.

One over a list is set back in place. One that Python can copy (``itertools.count()``, ``enumerate``, a range's) is
exchanged for a copy wherever it is held. A generator can be neither.
"""

from __future__ import annotations

import itertools
import operator
import types
import warnings
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_POSITIONED: tuple[type, ...] = tuple(map(type, (iter([]), iter(()), iter(""), iter(b""), reversed([]))))
"""Iterators that can be set back to a position."""
_COPIED: tuple[type, ...] = (
    *(itertools.count, itertools.cycle, itertools.chain, itertools.islice, itertools.accumulate, itertools.repeat),
    *(itertools.takewhile, itertools.dropwhile, itertools.product, itertools.permutations, itertools.combinations),
    *(enumerate, type(iter(range(0))), type(iter(range(1 << 70)))),
    *(type(iter({})), type(iter({}.values())), type(iter({}.items()))),
)
"""Iterators with a position of their own, of which a copy goes on from there."""


def position(iterator: Any) -> Any:
    """Where an iterator stands, without moving it; None where it does not say."""
    if type(iterator) is types.GeneratorType:
        frame = iterator.gi_frame
        if frame is None:
            return "at its end"
        return frame.f_lasti, tuple((name, _shown(v)) for name, v in frame.f_locals.items())
    if type(iterator) in _COPIED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 announces that 3.14 copies none of itertools
            reduced = getattr(type(iterator), "__reduce__", object.__reduce__)
            try:
                return _inside(reduced(iterator))
            except TypeError:
                return repr(iterator)
    try:
        return operator.length_hint(iterator, -1) if hasattr(type(iterator), "__length_hint__") else None
    except TypeError:  # without an end
        return None


def index_of(iterator: Any) -> int | None:
    """The state with which the iterator can be set back, or None."""
    reduced: tuple[Any, ...] = iterator.__reduce__() if type(iterator) in _POSITIONED else ()
    return reduced[2] if len(reduced) > 2 else None


def copy_of(iterator: Any) -> Any:
    """An iterator of its own that goes on from there, with inner ones of its own over the same items; or None."""
    if type(iterator) not in _COPIED:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _copied(iterator)
        except TypeError:
            return None


def _copied(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_copied, value))
    if not hasattr(type(value), "__next__"):
        return value
    if type(value) not in (*_COPIED, *_POSITIONED):
        raise TypeError(f"a {type(value).__name__} has no copy")
    make, given, *state = value.__reduce__()
    new = make(*map(_copied, given))
    if state and state[0] is not None:
        inner = state[0]
        kept = tuple(list(v) if type(v) is list else _copied(v) for v in inner) if type(inner) is tuple else inner
        new.__setstate__(kept)
    return new


def _inside(value: Any) -> Any:
    if type(value) in (tuple, list):
        return tuple(map(_inside, value))
    if hasattr(type(value), "__next__"):  # which may be another object at each look
        return type(value), position(value)
    return repr(value) if type(value) is range else _shown(value)


def _shown(value: Any) -> Any:
    return value if type(value) in _PLAIN else id(value)
