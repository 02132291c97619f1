"""The last part of a chain: from a direction to the step that is added to the weights."""

from __future__ import annotations

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Number, Transform, by_name, declare, stateless


def scale_by_learning_rate(lr: Number = 1e-3) -> Transform:
    """Multiply updates by ``-lr``. This is what makes a chain of parts an optimizer.

    Any shape; keeps nothing.

    Args:
        lr: In the unit of the direction before it; see the part that gives the direction. Live.

    Returns:
        A transform that takes a step.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.scale_by_lion(), optim.scale_by_learning_rate(optim.cosine(1e-4, 1000)))
        >>> optimizer.descends
        True
    """
    rate = declare("lr", lr)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        step = context.hyperparameters[rate.name]
        return {k: -step * u for k, u in updates.items()}

    return stateless(update, by_name(rate), "scale_by_learning_rate", descends=True)
