"""The last brick of a chain: from a direction to the step that is added to the weights."""

from __future__ import annotations

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare, stateless


def scale_by_learning_rate(lr: Scalar = 1e-3) -> Transform:
    """Multiply updates by ``-lr``. The unit of lr is that of the direction before it: see each recipe."""
    rate = declare("lr", lr)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        step = context.hyperparameters[rate.name]
        return {k: -step * u for k, u in updates.items()}

    return stateless(update, {rate.name: rate.value}, "scale_by_learning_rate")
