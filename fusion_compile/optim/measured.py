"""What one part of an optimizer does to the size of the updates, as a number one can watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import wrapped
from fusion_compile.optim._transform import Context, Facts, State, Transform, bound, ones_like_scalar
from fusion_compile.optim.clip import global_norm

QUANTITIES = ("gain", "norm")


class MeasuredState(NamedTuple):
    """`base`: the measured transform's state; `value`: the last measurement, 0-dim."""

    base: State
    value: Tensor


def measured(base: Transform, name: str, what: str = "gain") -> Transform:
    """`base`, unchanged, with a diagnostic `name`: ``‖out‖ / ‖in‖`` (``"gain"``) or ``‖out‖`` (``"norm"``).

    Norms run over all entries of all banks that this part sees. A gain is 0 where nothing came in. For example
    ``measured(orthogonalize(), "comp/ns5_gain")``. It costs a read of what comes in and out (nothing where it fuses);
    4 bytes in all.
    """
    if what not in QUANTITIES:
        raise ValueError(f"what={what!r} is not known; use one of {', '.join(map(repr, QUANTITIES))}.")

    def init(params: Tensors) -> MeasuredState:
        return MeasuredState(base.init(params), torch.zeros_like(ones_like_scalar(params)))

    def update(
        updates: Tensors, state: MeasuredState, params: Tensors, context: Context
    ) -> tuple[Tensors, MeasuredState]:
        out, base_state = base.update(updates, state.base, params, context)
        value = global_norm(out)
        if what == "gain":
            came_in = global_norm(updates)
            value = torch.where(came_in > 0, value / came_in, torch.zeros_like(value))
        return out, MeasuredState(base_state, value.to(state.value.dtype))

    moves = base.gradient_point
    gradient_point = None
    if moves is not None:

        def gradient_point(params: Tensors, state: MeasuredState, context: Context) -> Tensors:
            return moves(params, state.base, context)

    passed = wrapped(base)
    tells = passed.pop("diagnostics", None)

    def diagnostics(state: MeasuredState) -> Mapping[str, Tensor]:
        return {**({} if tells is None else tells(state)), name: state.value}

    def bind(facts: Facts) -> Transform:
        return measured(bound(base, facts), name, what)

    return Transform(
        init,
        update,
        base.hyperparameters,
        base.roles,
        gradient_point,
        base.name,
        diagnostics,
        **passed,
        bind=None if base.bind is None else bind,
    )
