"""AdaBelief's direction: Adam whose second moment is that of the surprise g - mu (Zhuang et al., 2010.07468)."""

from __future__ import annotations

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Number, Transform
from fusion_compile.optim.scale_by_adam import adam_with


def scale_by_adabelief(betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-16) -> Transform:
    """``(mu / (1 - β₁ᵗ)) / (√(nu / (1 - β₂ᵗ)) + eps)`` with ``nu ← β₂ nu + (1 - β₂)(g - mu)² + eps``.

    Steps are long where gradients agree with their average. Any shape. 8 bytes a parameter.
    Source: 2010.07468, algorithm 2. Deviations: none.

    Args:
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Added to the second moment at each update, and to its root. Live.

    Returns:
        A transform without a step. The unit of a following lr is the size of a step of one entry.

    Raises:
        TypeError: `betas` is not a pair.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.scale_by_adabelief(), optim.scale_by_learning_rate(1e-3)).descends
        True
    """

    def of_surprise(nu: Tensors, updates: Tensors, mu: Tensors, beta2: Tensor, eps: Tensor) -> Tensors:
        found: Tensors = {}
        for k, g in updates.items():
            surprise = g - mu[k]
            found[k] = beta2 * nu[k] + (1 - beta2) * surprise * surprise + eps
        return found

    return adam_with("scale_by_adabelief", betas, eps, of_surprise)
