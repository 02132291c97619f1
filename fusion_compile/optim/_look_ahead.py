"""A gradient point some momenta ahead of the weights: where Nekaon takes its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    BankInfos,
    Context,
    Named,
    State,
    Transform,
    bound,
    merge_hyperparameters,
)


def look_ahead(
    base: Transform, average: Callable[[State], Tensors], k: Named, lr: Named, threshold: float
) -> Transform:
    """`base`, whose gradient is taken at ``p - clamp(k mu, ± k threshold lr)``, entry by entry.

    `average`: finds mu, an uphill average of steps, in the state of `base`. The point exists only inside the program;
    the module holds p. An entry of mu that is not a number counts as zero. `lr`: of this step.
    """

    def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
        ahead = context.hyperparameters[k.name]
        room = ahead * threshold * context.hyperparameters[lr.name]
        mu = average(state)
        return {key: p - _within(ahead * mu[key], room) for key, p in params.items()}

    def bind(infos: BankInfos) -> Transform:
        return look_ahead(bound(base, infos), average, k, lr, threshold)

    numbers = merge_hyperparameters(base.hyperparameters, {k.name: k.value})
    return base.with_extras(gradient_point=gradient_point, hyperparameters=numbers, bind=bind)


def _within(step: Tensor, room: Tensor) -> Tensor:
    number = torch.where(step.isnan(), torch.zeros_like(step), step)
    return torch.minimum(torch.maximum(number, -room), room)
