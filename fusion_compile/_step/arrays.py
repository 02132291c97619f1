"""Numpy in a batch: the loss gets the tensor that ``torch.from_numpy`` makes of an array, on the model's device.

An array's dtype stays: float64 is float64, as in the ordinary loop. Numpy's scalars become Python numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_compile._step.containers import map_leaves

_SCALARS = (np.number, np.bool_)


def holds_numpy(found: list[Any]) -> bool:
    """Whether one of these leaves is an array or a scalar of numpy."""
    return any(isinstance(leaf, np.ndarray | np.generic) for leaf in found)


def without_numpy(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """`batch` with tensors in the places of numpy's arrays and Python numbers in those of its scalars.

    On a CPU a tensor shares the array's memory, unless that cannot be written or runs backwards. What no tensor can
    hold (text, objects, a mask) stays, and is refused with the rest of the batch.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, _SCALARS) and not isinstance(leaf, np.complexfloating):
            return leaf.item()
        return _tensor(leaf, device) if isinstance(leaf, np.ndarray) and why_not(leaf) == "" else leaf

    found: tuple[Any, ...] = map_leaves(one, batch)
    return found


def why_not(array: np.ndarray[Any, Any]) -> str:
    """Why no tensor can hold `array`; empty where one can."""
    if isinstance(array, np.ma.MaskedArray):
        return "whose mask a tensor would lose; give the data and the mask"
    try:
        torch.from_numpy(np.zeros(1, dtype=array.dtype))
    except (TypeError, ValueError):
        no_tensor = "whose dtype (or byte order) no tensor has"
        return f"{no_tensor}; convert it, or leave out of the batch what the loss does not read"
    return ""


def _tensor(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device)


@contextlib.contextmanager
def from_numpy_takes_tensors() -> Iterator[None]:
    """Inside, ``torch.from_numpy`` gives back a tensor: a loss that converts its arrays finds that done."""
    original = torch.from_numpy

    def from_numpy(ndarray: Any) -> Tensor:
        return ndarray.detach() if isinstance(ndarray, Tensor) else original(ndarray)

    torch.from_numpy = from_numpy
    try:
        yield
    finally:
        torch.from_numpy = original
