"""Cautious weight decay: only where it pulls the same way as the step (2510.12402)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Number, Transform, by_name, declare, stateless
from fusion_compile.optim._tree import map_tensors


def add_cautious_weight_decay(weight_decay: Number = 0.0) -> Transform:
    """``u + weight_decay * 1[u W >= 0] W``: replaces `add_decayed_weights`, at the same place in a chain.

    The step subtracts lr times both terms, so where ``u W < 0`` the direction grows the weight and the decay would
    fight it. A zero direction counts as agreement: a weight without gradient decays in full. Any shape; keeps nothing.
    Source: the paper's update rule; the masks (>=) of dion and modded-nanogpt. Deviations: signs are compared, because
    the product of two small numbers rounds to zero and would count as agreement.

    Args:
        weight_decay: Per unit of lr, the same number as without caution. Live.

    Returns:
        A transform without a step.

    Example:
        >>> import torch
        >>> from fusion_compile import optim
        >>> decay = optim.add_cautious_weight_decay(0.5)
        >>> weights, direction = {"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([1.0, -1.0])}
        >>> context = optim.Context({"weight_decay": torch.tensor(0.5)})
        >>> decay.update(direction, decay.init(weights), weights, context)[0]["w"].tolist()
        [2.0, -1.0]
    """
    wd = declare("weight_decay", weight_decay)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        rate = context.hyperparameters[wd.name]

        def decayed(u: Tensor, w: Tensor) -> Tensor:
            agree = u.sign() * w.sign() >= 0
            return u + rate * torch.where(agree, w, torch.zeros_like(u))

        return map_tensors(decayed, updates, params)

    return stateless(update, by_name(wd), "add_cautious_weight_decay")
