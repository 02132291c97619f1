"""Schedule-Free learning, as a wrapper around any transform (Defazio et al., 2405.15682).

Three sequences: z is stepped by the wrapped transform, x is their weighted average, and the gradient is taken at
y = β x + (1 - β) z. The parameters of the module are **x**, the weights one deploys; z is state; y exists only inside
the program. There is no ``train()``/``eval()`` mode to forget.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    Context,
    Scalar,
    State,
    Transform,
    declare,
    merge_hyperparameters,
    ones_like_scalar,
)


class ScheduleFreeState(NamedTuple):
    """`z`: shaped like the parameters; `lr_max`, `weight_sum`: 0-dim; `base`: the wrapped transform's state."""

    z: Tensors
    lr_max: Tensor
    weight_sum: Tensor
    base: State


def schedule_free(
    base: Transform,
    lr: Scalar = 1e-3,
    beta: Scalar = 0.9,
    *,
    decay_at_y: Scalar | None = None,
) -> Transform:
    """z ← z + base(∇f(y)); x ← (1 - c) x + c z; c = lr_max² / Σ lr_max².

    `base` must already contain the learning rate; `lr` names the same hyperparameter, which weighs the average, and
    whose running maximum counts (so warm-up steps weigh little). `base` sees z as its parameters: a decay inside it
    acts at z (SF-NorMuon, ``ScheduleFreeWrapper``). `decay_at_y`: a decay per unit of lr that acts at y instead,
    ``z ← z - lr · decay · y`` (the default of ``schedulefree.AdamWScheduleFree``).

    Deviations: the exponents of the average are fixed at the defaults r = 0 and weight_lr_power = 2.
    """
    rate, b = declare("lr", lr), declare("schedule_free_beta", beta)
    decay = None if decay_at_y is None else declare("weight_decay", decay_at_y)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} already moves the gradient point; schedule_free() cannot wrap it again.")

    def init(params: Tensors) -> ScheduleFreeState:
        zero = torch.zeros_like(ones_like_scalar(params))
        return ScheduleFreeState({k: p.clone() for k, p in params.items()}, zero, zero.clone(), base.init(params))

    def gradient_point(params: Tensors, state: ScheduleFreeState, context: Context) -> Tensors:
        beta = context.hyperparameters[b.name]
        return {k: state.z[k] + beta * (x - state.z[k]) for k, x in params.items()}

    def update(
        updates: Tensors, state: ScheduleFreeState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScheduleFreeState]:
        h = context.hyperparameters
        lr = h[rate.name]
        moves, base_state = base.update(updates, state.base, state.z, context)
        z = {k: state.z[k] + moves[k] for k in params}
        if decay is not None:
            y = gradient_point(params, state, context)
            z = {k: z[k] - lr * h[decay.name] * y[k] for k in params}
        lr_max = torch.maximum(state.lr_max, lr)
        weight = lr_max * lr_max
        weight_sum = state.weight_sum + weight
        # At lr = 0 from the start both are zero: the average then stays where it is.
        c = torch.where(weight_sum > 0, weight / weight_sum, torch.zeros_like(weight))
        averaged = {k: c * (z[k] - x) for k, x in params.items()}
        return averaged, ScheduleFreeState(z, lr_max, weight_sum, base_state)

    named = [rate, b] if decay is None else [rate, b, decay]
    hyperparameters = merge_hyperparameters(base.hyperparameters, {n.name: n.value for n in named})
    return Transform(init, update, hyperparameters, base.roles, gradient_point, f"schedule_free({base.name})")
