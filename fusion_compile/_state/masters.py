"""The fp32 master of a half-precision weight, and the one rule that says when the module's weight counts instead."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors


def adopt_written(master: Tensor, shown: Tensor) -> Tensor:
    """`master`, except where `shown` is no longer its rounding: there the user wrote the weight, so adopt it.

    Both have one shape; `shown` has the module's dtype. ``load_state_dict`` and ``parameter.copy_`` are such writes.
    """
    return torch.where(master.to(shown.dtype) == shown, master, shown.to(master.dtype))


def with_written_weights(layout: Layout, state: Tensors) -> Tensors:
    """`state` with every write to a ``module/`` bank adopted into the optimizer's weights. Does not change `state`."""
    adopted = {
        keys.params(b.key): adopt_written(state[keys.params(b.key)], state[keys.module(b.key)])
        for b in layout.banks
        if keys.module(b.key) in state and keys.params(b.key) in state
    }
    return {**state, **adopted}


def rounded(layout: Layout, point: Tensors, state: Tensors) -> Tensors:
    """What the module shows of the weights `point`, for each bank whose ``module/`` entry `state` has."""
    return {keys.module(b.key): point[b.key].to(b.dtype) for b in layout.banks if keys.module(b.key) in state}
