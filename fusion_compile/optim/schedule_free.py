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
from fusion_compile.optim._averaging import Averaging
from fusion_compile.optim._combine import wrapped
from fusion_compile.optim._transform import (
    Context,
    Facts,
    Scalar,
    State,
    Transform,
    bound,
    declare,
    merge_hyperparameters,
    ones_like_scalar,
)


class ScheduleFreeState(NamedTuple):
    """`z`: shaped like the parameters; `lr_max`, `weight_sum`: 0-dim; `base`: the wrapped transform's state; `taken`:
    ``{"k": updates taken}`` where `anneal`, `c_warmup` or `r` needs it, else empty."""

    z: Tensors
    lr_max: Tensor
    weight_sum: Tensor
    base: State
    taken: Tensors


def schedule_free(
    base: Transform,
    lr: Scalar = 1e-3,
    beta: Scalar = 0.9,
    *,
    decay_at_y: Scalar | None = None,
    beta_max: Scalar = 0.965,
    anneal: int = 0,
    c_warmup: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    average: str = "lr_max",
) -> Transform:
    """z ← z + base(∇f(y)); x ← (1 - c) x + c z; c = w / Σ w, w = lr_max².

    `base` must already contain the learning rate; `lr` names the same hyperparameter, which weighs the average, and
    whose running maximum counts (so warm-up steps weigh little). `base` sees z as its parameters: a decay inside it
    acts at z (SF-NorMuon, ``ScheduleFreeWrapper``). `decay_at_y`: a decay per unit of lr that acts at y instead,
    ``z ← z - lr · decay · y`` (the default of ``schedulefree.AdamWScheduleFree``). 4 bytes a parameter.

    Options, for updates k = 0, 1, …; all but `beta_max` are fixed when the program is built. `average`: ``"lr"`` puts
    this update's lr in the place of lr_max (SF-NorMuon's paper, 2605.23061; the same until the lr falls).
    ``w = (k + 1)^r lr_max^weight_lr_power`` (``schedulefree``). From ScheduleFree+ (2605.19095): `c_warmup`: ``c = 1``,
    so x = z, while k < c_warmup, and those updates weigh nothing later; `anneal`: β grows to `beta_max` over so many
    updates, ``β_k = 1 - (1 - β)^(1-p) (1 - β_max)^p`` with ``p = min(k / anneal, 1)``.

    Deviations: none from ``schedulefree``, which has `r` and `weight_lr_power` of these options.
    """
    rate = declare("lr", lr)
    averaging = Averaging(
        declare("schedule_free_beta", beta),
        declare("schedule_free_beta_max", beta_max),
        anneal,
        c_warmup,
        r,
        weight_lr_power,
        average,
    )
    decay = None if decay_at_y is None else declare("weight_decay", decay_at_y)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} already moves the gradient point; schedule_free() cannot wrap it again.")

    def init(params: Tensors) -> ScheduleFreeState:
        zero = torch.zeros_like(ones_like_scalar(params))
        z = {k: p.clone() for k, p in params.items()}
        return ScheduleFreeState(z, zero, zero.clone(), base.init(params), averaging.taken(params))

    def gradient_point(params: Tensors, state: ScheduleFreeState, context: Context) -> Tensors:
        return averaging.point(params, state.z, state.taken, context)

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
        averaged, lr_max, weight_sum, taken = averaging.move(params, z, lr, state.lr_max, state.weight_sum, state.taken)
        return averaged, ScheduleFreeState(z, lr_max, weight_sum, base_state, taken)

    named = [rate, *averaging.numbers, *([] if decay is None else [decay])]

    def bind(facts: Facts) -> Transform:
        return schedule_free(
            bound(base, facts),
            lr,
            beta,
            decay_at_y=decay_at_y,
            beta_max=beta_max,
            anneal=anneal,
            c_warmup=c_warmup,
            r=r,
            weight_lr_power=weight_lr_power,
            average=average,
        )

    return Transform(
        init,
        update,
        merge_hyperparameters(base.hyperparameters, {n.name: n.value for n in named}),
        base.roles,
        gradient_point,
        f"schedule_free({base.name})",
        **wrapped(base, params_of=lambda _, state: state.z),
        bind=None if base.bind is None else bind,
    )
