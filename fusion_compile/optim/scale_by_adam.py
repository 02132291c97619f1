"""Adam's direction: bias-corrected first moment over the root of the bias-corrected second (Kingma & Ba, 1412.6980)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare, ones_like_scalar


class ScaleByAdamState(NamedTuple):
    """`mu`, `nu`: moments, shaped like the parameters. `beta1_power`, `beta2_power`: β₁ᵗ and β₂ᵗ, 0-dim.

    The powers are state, multiplied once a step: a C++ loop that calls ``pow`` for every vector costs 40 % of the
    update on a CPU, and with a live β the product of the betas really used is the right correction.
    """

    mu: Tensors
    nu: Tensors
    beta1_power: Tensor
    beta2_power: Tensor


def scale_by_adam(beta1: Scalar = 0.9, beta2: Scalar = 0.999, eps: Scalar = 1e-8) -> Transform:
    """``(mu / (1 - β₁ᵗ)) / (sqrt(nu / (1 - β₂ᵗ)) + eps)``; entries are dimensionless, about 1 in size.

    Works on any shape. `eps` stands outside the root, as in ``torch.optim.AdamW``. Deviations: none.
    """
    b1, b2, e = declare("beta1", beta1), declare("beta2", beta2), declare("eps", eps)

    def init(params: Tensors) -> ScaleByAdamState:
        return ScaleByAdamState(
            mu={k: torch.zeros_like(p) for k, p in params.items()},
            nu={k: torch.zeros_like(p) for k, p in params.items()},
            beta1_power=ones_like_scalar(params),
            beta2_power=ones_like_scalar(params),
        )

    def update(
        updates: Tensors, state: ScaleByAdamState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdamState]:
        h = context.hyperparameters
        beta1, beta2, eps = h[b1.name], h[b2.name], h[e.name]
        power1, power2 = state.beta1_power * beta1, state.beta2_power * beta2
        step_size, root_correction = 1 / (1 - power1), (1 - power2).sqrt()
        mu = {k: state.mu[k] + (1 - beta1) * (g - state.mu[k]) for k, g in updates.items()}
        nu = {k: state.nu[k] * beta2 + (1 - beta2) * g * g for k, g in updates.items()}
        scaled = {k: step_size * mu[k] / (nu[k].sqrt() / root_correction + eps) for k in updates}
        return scaled, ScaleByAdamState(mu, nu, power1, power2)

    return Transform(init, update, {n.name: n.value for n in (b1, b2, e)}, name="scale_by_adam")


class ScaleByRmsState(NamedTuple):
    """`nu`: second moment, shaped like the parameters; `beta2_power`: β₂ᵗ, 0-dim."""

    nu: Tensors
    beta2_power: Tensor


def scale_by_rms(beta2: Scalar = 0.999, eps: Scalar = 1e-8) -> Transform:
    """Adam's direction without a first moment, ``g / (sqrt(nu / (1 - β₂ᵗ)) + eps)``: the inner step of Schedule-Free
    AdamW.

    Source: Defazio et al., 2405.15682, and ``schedulefree.AdamWScheduleFree``. Deviations: none.
    """
    b2, e = declare("beta2", beta2), declare("eps", eps)

    def init(params: Tensors) -> ScaleByRmsState:
        return ScaleByRmsState({k: torch.zeros_like(p) for k, p in params.items()}, ones_like_scalar(params))

    def update(
        updates: Tensors, state: ScaleByRmsState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByRmsState]:
        beta2, eps = context.hyperparameters[b2.name], context.hyperparameters[e.name]
        power2 = state.beta2_power * beta2
        root_correction = (1 - power2).sqrt()
        nu = {k: state.nu[k] * beta2 + (1 - beta2) * g * g for k, g in updates.items()}
        scaled = {k: g / (nu[k].sqrt() / root_correction + eps) for k, g in updates.items()}
        return scaled, ScaleByRmsState(nu, power2)

    return Transform(init, update, {n.name: n.value for n in (b2, e)}, name="scale_by_rms")
