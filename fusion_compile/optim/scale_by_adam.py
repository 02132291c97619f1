"""Adam's direction: bias-corrected first moment over the root of the bias-corrected second (Kingma & Ba, 1412.6980)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare, declare_betas
from fusion_compile.optim._tree import map_tensors, number_like, update_mean, update_mean_square, zeros_like

SecondMoment: TypeAlias = Callable[[Tensors, Tensors, Tensors, Tensor, Tensor], Tensors]
"""``(nu, g, mu, β₂, eps) -> nu``: the second moment after one more gradient; mu has it already."""


class ScaleByAdamState(NamedTuple):
    """`mu`, `nu`: moments, shaped like the parameters. `beta1_power`, `beta2_power`: β₁ᵗ and β₂ᵗ, 0-dim.

    The powers are state, multiplied once a step: a C++ loop that calls ``pow`` for every vector costs 40 % of the
    update on a CPU, and with a live β the product of the betas really used is the right correction.
    """

    mu: Tensors
    nu: Tensors
    beta1_power: Tensor
    beta2_power: Tensor


def scale_by_adam(betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8) -> Transform:
    """``(mu / (1 - β₁ᵗ)) / (sqrt(nu / (1 - β₂ᵗ)) + eps)``: entries are dimensionless, about 1 in size.

    ``mu ← lerp(mu, g, 1 - β₁)``, ``nu ← β₂ nu + (1 - β₂) g²``. Any shape. 8 bytes a parameter.
    Source: 1412.6980; `eps` stands outside the root, as in ``torch.optim.AdamW``. Deviations: none.

    Args:
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Added to the root of the second moment. Live.

    Returns:
        A transform without a step. The unit of a following lr is the size of a step of one entry.

    Raises:
        TypeError: `betas` is not a pair.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.scale_by_adam((0.9, 0.95)), optim.scale_by_learning_rate(1e-3))
        >>> dict(optimizer.hyperparameters)
        {'beta1': 0.9, 'beta2': 0.95, 'eps': 1e-08, 'lr': 0.001}
    """

    def of_squares(nu: Tensors, updates: Tensors, mu: Tensors, beta2: Tensor, eps: Tensor) -> Tensors:
        return update_mean_square(nu, updates, beta2)

    return adam_with("scale_by_adam", betas, eps, of_squares)


def adam_with(name: str, betas: tuple[Number, Number], eps: Number, second: SecondMoment) -> Transform:
    """Adam's direction with another second moment: the one place of its averages, powers and quotient."""
    (b1, b2), e = declare_betas(betas), declare("eps", eps)

    def init(params: Tensors) -> ScaleByAdamState:
        one = number_like(params, 1.0)
        return ScaleByAdamState(zeros_like(params), zeros_like(params), one, one.clone())

    def update(
        updates: Tensors, state: ScaleByAdamState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdamState]:
        h = context.hyperparameters
        beta1, beta2, eps = h[b1.name], h[b2.name], h[e.name]
        power1, power2 = state.beta1_power * beta1, state.beta2_power * beta2
        step_size, root_correction = 1 / (1 - power1), (1 - power2).sqrt()
        mu = update_mean(state.mu, updates, beta1)
        nu = second(state.nu, updates, mu, beta2, eps)
        scaled = map_tensors(lambda m, v: step_size * m / (v.sqrt() / root_correction + eps), mu, nu)
        return scaled, ScaleByAdamState(mu, nu, power1, power2)

    return Transform(init, update, Extras(name, by_name(b1, b2, e), second_moments=("nu",)))
