"""Cautious weight decay: only where it pulls the same way as the step (2510.12402)."""

from __future__ import annotations

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Scalar, Transform, declare, stateless


def cautious_weight_decay(weight_decay: Scalar = 0.0) -> Transform:
    """``u + weight_decay * 1[u W >= 0] W``: in place of `add_decayed_weights`, and like it after the final direction u
    and before `scale_by_learning_rate`.

    The step subtracts lr times both, so where ``u W < 0`` the direction grows the weight and the decay would fight it.
    A zero direction counts as agreement: a weight without gradient decays in full. `weight_decay`: per unit of lr, the
    same number as without caution; live under that name. Any shape; keeps nothing.
    Source: the paper's update rule; dion's and modded-nanogpt's masks (>=). Deviations: signs are compared, as the
    product of two small numbers rounds to zero and would count as agreement.
    """
    wd = declare("weight_decay", weight_decay)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        rate = context.hyperparameters[wd.name]
        decayed = {}
        for k, u in updates.items():
            agree = u.sign() * params[k].sign() >= 0
            decayed[k] = u + rate * torch.where(agree, params[k], torch.zeros_like(u))
        return decayed

    return stateless(update, {wd.name: wd.value}, "cautious_weight_decay")
