"""A copy of a module whose parameters are given tensors and whose buffers are the module's own."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fusion_compile._types import Tensors


def module_with(model: nn.Module, named: Tensors) -> nn.Module:
    """A copy of `model` that holds `named` for the parameters of these names, without a gradient.

    Buffers and parameters that are not named (frozen ones) are those of `model` itself. Tied parameters stay tied.
    Hooks and attributes are copied with it.
    """
    stands_for: dict[int, Any] = {id(b): b for b in model.buffers()}
    for name, parameter in model.named_parameters():
        own = named.get(name)
        stands_for[id(parameter)] = parameter if own is None else nn.Parameter(own, requires_grad=False)
    return copy.deepcopy(model, stands_for)
