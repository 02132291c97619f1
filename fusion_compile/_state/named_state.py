"""The optimizer's state by parameter name instead of by bank: the form of every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors


def kept_parts(layout: Layout, state: Tensors, weights: str = "master") -> Iterator[tuple[str, str | None, Tensor]]:
    """``(part, bank, tensor)`` of everything that a checkpoint keeps besides the model.

    `part`: the path in the transform's state, ``"0.mu"``, or `weights` for the optimizer's own copy of the weights
    where the module holds another. `bank`: None for a plain number.
    """
    for key, tensor in state.items():
        section, rest = keys.split(key)
        if section == keys.PARAMS and keys.module(rest) in state:
            yield weights, rest, tensor
        elif section in keys.LOST:
            yield section, rest, tensor
        elif section == keys.OPTIMIZER:
            bank = layout.bank_of(rest)
            part = rest if bank is None else rest.removesuffix(f"/{bank}")
            yield part.replace("/", "."), bank, tensor


def named_state(layout: Layout, state: Tensors) -> Tensors:
    """Views of the optimizer's state as ``{"<part>.<parameter>": tensor}``; plain numbers as ``{"<part>": tensor}``.

    The fp32 masters of lower-precision parameters are there too, as ``master.<parameter>``, or what their rounding
    lost, as ``mantissa.<parameter>`` or ``compensation.<parameter>``.
    """
    named: Tensors = {}
    for part, bank, tensor in kept_parts(layout, state):
        if bank is None:
            named[part] = tensor
        else:
            named |= {f"{part}.{name}": view for name, view in layout.by_name(bank, tensor)}
    return named
