"""Private torch API of the state: who else holds a tensor's memory."""

from __future__ import annotations

import torch
from torch import Tensor

_COUNT = getattr(torch._C, "_storage_Use_Count", None)


def others_hold(tensor: Tensor, known: int = 0) -> bool:
    """Whether more than `tensor` and `known` others hold its memory; True where torch cannot tell."""
    memory = tensor.untyped_storage()
    return _COUNT is None or _COUNT(memory._cdata) > 2 + known  # the tensor, and `memory`
