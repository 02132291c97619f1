"""A diagnostic of one part of an optimizer: how it changes the size of the updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._transform import Context, State, Transform, check_transform
from fusion_compile.optim._tree import number_like
from fusion_compile.optim.clip_by_global_norm import global_norm

QUANTITIES = ("gain", "norm")


class MeasuredState(NamedTuple):
    """`base`: the measured transform's state; `value`: the last measurement, 0-dim."""

    base: State
    value: Tensor


def measured(base: Transform, name: str, what: str = "gain") -> Transform:
    """`base`, unchanged, with a diagnostic `name`.

    Norms run over all entries of all banks that this part sees. It costs a read of the incoming and outgoing updates
    (nothing if it fuses); 4 bytes in all.

    Args:
        base: The part to measure.
        name: Of the diagnostic, as ``step.metrics`` shows it; ``comp/…`` by custom.
        what: ``"gain"``: ``‖out‖ / ‖in‖``, 0 if nothing came in; ``"norm"``: ``‖out‖``.

    Returns:
        A transform with the same updates, roles and numbers as `base`.

    Raises:
        ValueError: `what` is not one of the two.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.measured(optim.orthogonalize(), "comp/ns5_gain")
        >>> direction.name
        'orthogonalize'
    """
    check_transform("measured(), base,", base)
    if what not in QUANTITIES:
        raise ValueError(f"what={what!r} is not known; use one of {', '.join(map(repr, QUANTITIES))}.")

    def init(params: Tensors) -> MeasuredState:
        return MeasuredState(base.init(params), number_like(params, 0.0))

    def update(
        updates: Tensors, state: MeasuredState, params: Tensors, context: Context
    ) -> tuple[Tensors, MeasuredState]:
        out, base_state = base.update(updates, state.base, params, context)
        value = global_norm(out)
        if what == "gain":
            came_in = global_norm(updates)
            value = torch.where(came_in > 0, value / came_in, torch.zeros_like(value))
        return out, MeasuredState(base_state, value.to(state.value.dtype))

    def diagnostics(state: MeasuredState) -> Mapping[str, Tensor]:
        return {name: state.value}

    def rebuild(base: Transform) -> Transform:
        return measured(base, name, what)

    extras = wrap(base, base.name, {}, diagnostics=diagnostics, rebuild=rebuild)
    return Transform(init, update, extras._replace(after_step=base.after_step))
