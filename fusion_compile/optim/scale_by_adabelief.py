"""AdaBelief's direction: Adam whose second moment is that of the surprise g - mu (Zhuang et al., 2010.07468)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare, declare_betas
from fusion_compile.optim._tree import number_like, update_mean, zeros_like


class ScaleByAdabeliefState(NamedTuple):
    """`mu`: average of the gradient; `nu`: of the squared surprise. `beta1_power`, `beta2_power`: β₁ᵗ, β₂ᵗ, 0-dim."""

    mu: Tensors
    nu: Tensors
    beta1_power: Tensor
    beta2_power: Tensor


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
    (b1, b2), e = declare_betas(betas), declare("eps", eps)

    def init(params: Tensors) -> ScaleByAdabeliefState:
        one = number_like(params, 1.0)
        return ScaleByAdabeliefState(zeros_like(params), zeros_like(params), one, one.clone())

    def update(
        updates: Tensors, state: ScaleByAdabeliefState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdabeliefState]:
        h = context.hyperparameters
        beta1, beta2, small = h[b1.name], h[b2.name], h[e.name]
        power1, power2 = state.beta1_power * beta1, state.beta2_power * beta2
        mu = update_mean(state.mu, updates, beta1)
        nu: Tensors = {}
        scaled: Tensors = {}
        for k, g in updates.items():
            surprise = g - mu[k]
            nu[k] = beta2 * state.nu[k] + (1 - beta2) * surprise * surprise + small
            scaled[k] = mu[k] / (1 - power1) / ((nu[k] / (1 - power2)).sqrt() + small)
        return scaled, ScaleByAdabeliefState(mu, nu, power1, power2)

    return Transform(init, update, Extras("scale_by_adabelief", by_name(b1, b2, e), second_moments=("nu",)))
