"""Values that user code keeps, with tensors in them: copied, detached, compared bitwise."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_compile._capture.python_state.alike import is_alike
from fusion_compile._capture.python_state.slots import MISSING
from fusion_compile._capture.rehearsal._compat import dense_tensors
from fusion_compile._capture.rehearsal.provenance import Provenance

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
"""Types of values that have no parts."""


def detached(value: Any) -> Any:
    """`value` with tensors detached, in tuples, lists and dictionaries too; other objects as they are."""
    return _mapped(value, Tensor.detach)


def snapshot(value: Any) -> Any:
    """`value` with tensors copied, in tuples, lists and dictionaries too."""
    return _mapped(value, lambda tensor: tensor.detach().clone())


def before_run(provenance: Provenance, run: int, value: Any) -> Any:
    """`value` with tensors that have the numbers of the time when `run` began."""
    return _mapped(value, lambda tensor: provenance.before_run(run, tensor))


def is_equal(a: Any, b: Any, *, opaque_are_equal: bool = False) -> bool:
    """Bitwise equality of tensors, arrays and plain values in tuples, lists and dictionaries; NaN equals itself.
    `opaque_are_equal`: whether other objects of one type count as equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
        return alike and all(map(_has_equal_bytes, dense_tensors(a.detach()), dense_tensors(b.detach())))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        same = a.keys() == b.keys()
        return same and all(is_equal(a[key], b[key], opaque_are_equal=opaque_are_equal) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        same = len(a) == len(b)
        return same and all(is_equal(v, w, opaque_are_equal=opaque_are_equal) for v, w in zip(a, b, strict=True))
    if opaque_are_equal and not is_plain(a):
        return type(a) is type(b)
    return is_alike(a, b)


def _has_equal_bytes(a: Tensor, b: Tensor) -> bool:
    flat = (t.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)


def is_plain(value: Any) -> bool:
    """Whether `value` is plain, an enum's member, nothing, or a container of such."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value.values()))
    return type(value) in PLAIN or value is MISSING or isinstance(value, (enum.Enum, np.generic))


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(inner, function) for inner in value)
    if isinstance(value, dict):
        return {key: _mapped(inner, function) for key, inner in dict.items(value)}
    return value
