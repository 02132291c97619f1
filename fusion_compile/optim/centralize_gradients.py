"""Gradient centralization: the mean of each row is subtracted (Yong et al., 2004.01461)."""

from __future__ import annotations

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import ELEMENTWISE, MATRIX, Context, Transform, stateless


def centralize_gradients() -> Transform:
    """``g - mean(g)`` over each row of a matrix, of a convolution over all axes but the first. Vectors stay.

    The gradient itself is not changed: who reads ``p.grad`` sees what backward left. Keeps nothing.
    Source: 2004.01461; K-Optimizers. Deviations: none.

    Returns:
        A transform without a step, for the roles ``"matrix"`` and ``"scalar"``. In a chain it is the first.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.centralize_gradients(), optim.lion(1e-4))
        >>> optimizer.roles
        ('matrix', 'scalar')
    """

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        return {k: g - g.mean(-1, keepdim=True) if g.ndim > 1 else 1 * g for k, g in updates.items()}

    return stateless(update, {}, "centralize_gradients").with_extras(roles=(MATRIX, ELEMENTWISE))
