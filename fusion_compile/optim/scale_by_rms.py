"""Adam's direction without a first moment: the inner step of Schedule-Free AdamW (Defazio et al., 2405.15682)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Extras, Number, Transform, by_name, declare
from fusion_compile.optim._tree import map_tensors, number_like, update_mean_square, zeros_like


class ScaleByRmsState(NamedTuple):
    """`nu`: second moment, shaped like the parameters; `beta2_power`: β₂ᵗ, 0-dim."""

    nu: Tensors
    beta2_power: Tensor


def scale_by_rms(beta: Number = 0.999, eps: Number = 1e-8) -> Transform:
    """``g / (sqrt(nu / (1 - β₂ᵗ)) + eps)`` with ``nu ← β₂ nu + (1 - β₂) g²``: entries are about 1 in size.

    Any shape. 4 bytes a parameter.
    Source: 2405.15682 and ``schedulefree.AdamWScheduleFree``. Deviations: none.

    Args:
        beta: β₂, decay of the second moment. Live as ``beta2``, the name it has in Adam.
        eps: Added to the root of the second moment. Live.

    Returns:
        A transform without a step. The unit of a following lr is the size of a step of one entry.

    Example:
        >>> from fusion_compile import optim
        >>> z_step = optim.chain(optim.scale_by_rms(), optim.scale_by_learning_rate(2.5e-3))
        >>> optim.schedule_free(z_step, lr=2.5e-3).descends
        True
    """
    b2, e = declare("beta2", beta), declare("eps", eps)

    def init(params: Tensors) -> ScaleByRmsState:
        return ScaleByRmsState(zeros_like(params), number_like(params, 1.0))

    def update(
        updates: Tensors, state: ScaleByRmsState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByRmsState]:
        beta2, eps = context.hyperparameters[b2.name], context.hyperparameters[e.name]
        power2 = state.beta2_power * beta2
        root_correction = (1 - power2).sqrt()
        nu = update_mean_square(state.nu, updates, beta2)
        scaled = map_tensors(lambda g, v: g / (v.sqrt() / root_correction + eps), updates, nu)
        return scaled, ScaleByRmsState(nu, power2)

    return Transform(init, update, Extras("scale_by_rms", by_name(b2, e), second_moments=("nu",)))
