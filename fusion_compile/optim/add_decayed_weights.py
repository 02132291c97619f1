"""Decoupled weight decay (Loshchilov & Hutter, 1711.05101)."""

from __future__ import annotations

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Number, Transform, by_name, declare, stateless


def add_decayed_weights(weight_decay: Number = 0.0) -> Transform:
    """``u + weight_decay * params``, to be put before `scale_by_learning_rate`, which multiplies the decay by lr.

    Any shape; keeps nothing. Inside `schedule_free` the parameters it sees are z, so the decay acts at z.
    Source: 1711.05101. Deviations: none.

    Args:
        weight_decay: Per unit of lr: a step multiplies the weights by ``1 - lr * weight_decay``. Live.

    Returns:
        A transform without a step.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(
        ...     optim.scale_by_adam(), optim.add_decayed_weights(0.1), optim.scale_by_learning_rate(1e-3)
        ... )
        >>> optimizer.hyperparameters["weight_decay"]
        0.1
    """
    wd = declare("weight_decay", weight_decay)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        rate = context.hyperparameters[wd.name]
        return {k: u + rate * params[k] for k, u in updates.items()}

    return stateless(update, by_name(wd), "add_decayed_weights")
