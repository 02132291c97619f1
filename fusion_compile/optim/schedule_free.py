"""Schedule-Free learning, as a wrapper around any transform (Defazio et al., 2405.15682).

Three sequences: z is stepped by the wrapped transform, x is their weighted average, and the gradient is taken at
y = β x + (1 - β) z. The parameters of the module are **x**, the weights to deploy; z is state; y exists only inside the
program. There is no ``train()``/``eval()`` mode to forget.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._averaging import Averaging
from fusion_compile.optim._inner import BASE_AT_Z, wrap
from fusion_compile.optim._transform import Context, Number, State, Transform, by_name, check_transform, declare
from fusion_compile.optim._tree import copy, number_like, sum_like


class ScheduleFreeState(NamedTuple):
    """`z`: shaped like the parameters; `lr_max`, `weight_sum`: 0-dim; `base`: the wrapped transform's state; `taken`:
    ``{"k": updates taken}`` if `anneal`, `c_warmup` or `r` needs it, else empty."""

    z: Tensors
    lr_max: Tensor
    weight_sum: Tensor
    base: State
    taken: Tensors


def schedule_free(
    base: Transform,
    lr: Number = 1e-3,
    beta: Number = 0.9,
    *,
    decay_at_y: Number | None = None,
    beta_max: Number = 0.965,
    anneal: int = 0,
    c_warmup: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    average: str = "lr_max",
) -> Transform:
    """``z ← z + base(∇f(y)); x ← (1 - c) x + c z; c = w / Σ w``, ``w = (k + 1)^r lr_max^weight_lr_power``.

    The gradient is taken at ``y = β x + (1 - β) z``. All options except `beta_max` are fixed when the program is built;
    k = 0, 1, … counts updates. 4 bytes a parameter.
    Source: 2405.15682, ``schedulefree``; the options from SF-NorMuon (2605.23061) and ScheduleFree+ (2605.19095).
    Deviations: none from ``schedulefree``, which has only the options `r` and `weight_lr_power`.

    Args:
        base: Takes the step, so it contains the learning rate. It sees z as its parameters: a decay inside it acts at z
            (SF-NorMuon, ``ScheduleFreeWrapper``).
        lr: The same hyperparameter as in `base`. It weighs the average by its running maximum, so warm-up steps weigh
            little.
        beta: β. Live as ``schedule_free_beta``.
        decay_at_y: A decay per unit of lr that acts at y instead, ``z ← z - lr · decay · y`` (the default of
            ``schedulefree.AdamWScheduleFree``). Live as ``weight_decay``.
        beta_max: β after `anneal` updates. Live as ``schedule_free_beta_max`` if `anneal` is used.
        anneal: β grows to `beta_max` over so many updates: ``β_k = 1 - (1 - β)^(1-p) (1 - β_max)^p``, ``p = min(k /
            anneal, 1)`` (ScheduleFree+).
        c_warmup: ``c = 1``, so x = z, while k < c_warmup, and those updates weigh nothing later (ScheduleFree+).
        r: Exponent of the number of updates in w.
        weight_lr_power: Exponent of the lr in w.
        average: ``"lr_max"``, or ``"lr"``: w contains this update's lr instead of lr_max (SF-NorMuon; the same until
            the lr falls).

    Returns:
        A transform that moves the gradient point to y; it takes a step if `base` does.

    Raises:
        ValueError: `base` moves the gradient point already; an option is out of range; one hyperparameter has two
            values.

    Example:
        >>> from fusion_compile import optim
        >>> z_step = optim.chain(optim.scale_by_rms(), optim.scale_by_learning_rate(2.5e-3))
        >>> optimizer = optim.schedule_free(z_step, lr=2.5e-3)
        >>> optimizer.gradient_point is not None
        True
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
    check_transform("schedule_free(), base,", base)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} already moves the gradient point; schedule_free() cannot wrap it again.")

    def init(params: Tensors) -> ScheduleFreeState:
        lr_max, weight_sum = number_like(params, 0.0), sum_like(params)
        return ScheduleFreeState(copy(params), lr_max, weight_sum, base.init(params), averaging.taken(params))

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

    def rebuild(base: Transform) -> Transform:
        return schedule_free(
            base,
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

    numbers = by_name(rate, *averaging.numbers, *([] if decay is None else [decay]))
    extras = wrap(base, f"schedule_free({base.name})", numbers, inner=BASE_AT_Z, rebuild=rebuild)
    return Transform(init, update, extras._replace(gradient_point=gradient_point))
