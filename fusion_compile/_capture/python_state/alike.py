"""Which values are the same to a program: plain ones that are equal, and containers of such or of the same objects."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from typing import Any

import numpy as np
import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(Ellipsis))
"""Classes of values that have no parts and never change."""


def is_alike(now: Any, before: Any, depth: int = 6) -> bool:
    """Whether two objects are the same value. Tensors, modules and other objects are themselves only. Containers are
    compared down to `depth`."""
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
    if isinstance(before, weakref.ref):  # a dead one says nothing: torch's list of an LSTM's weights
        return before() is None or now() is before()
    if isinstance(before, types.MethodType):
        return now.__func__ is before.__func__ and now.__self__ is before.__self__
    if isinstance(before, types.BuiltinMethodType):
        return now.__self__ is before.__self__ and now.__name__ == before.__name__
    if isinstance(before, functools.partial):
        parts = ("func", "args", "keywords")
        return all(is_alike(getattr(now, part), getattr(before, part), depth - 1) for part in parts)
    return False
