"""Decoupled weight decay (Loshchilov & Hutter, 1711.05101)."""

from __future__ import annotations

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare, stateless


def add_decayed_weights(weight_decay: Scalar = 0.0) -> Transform:
    """Add ``weight_decay * params`` to the updates; put it before `scale_by_learning_rate`, so that the decay is
    times lr.

    `weight_decay`: per unit of lr; a step multiplies the weights by ``1 - lr * weight_decay``. Inside `schedule_free`
    the params it sees are z, so the decay acts at z.
    """
    wd = declare("weight_decay", weight_decay)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        rate = context.hyperparameters[wd.name]
        return {k: u + rate * params[k] for k, u in updates.items()}

    return stateless(update, {wd.name: wd.value}, "add_decayed_weights")
