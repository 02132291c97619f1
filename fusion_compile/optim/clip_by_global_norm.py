"""Clipping by the global norm of all gradients (Pascanu et al., 1211.5063)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import Context, Number, Transform, by_name, declare, stateless


def global_norm(tensors: Tensors) -> Tensor:
    """Euclidean norm over all entries of all tensors, 0-dim, computed in at least fp32; 0 without tensors."""
    exact = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors.values()]
    return total([t * t for t in exact], torch.zeros(())).sqrt()


def clip_factor(norm: Tensor, max_norm: Tensor) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_``; an infinite `max_norm` gives
    exactly 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_by_global_norm(max_norm: Number = 1.0) -> Transform:
    """Scale all updates by one factor, so that their global norm is at most `max_norm`.

    In a chain it must stand before a `partition`, whose parts see only some of the parameters. The training step
    has its own ``clip_grad_norm``. Source: 1211.5063; ``torch.nn.utils.clip_grad_norm_``. Deviations: none.

    Args:
        max_norm: In the unit of the gradient. Live as ``max_norm``.

    Returns:
        A transform without a step. Any shape; keeps nothing.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
        >>> optimizer.descends
        True
    """
    bound = declare("max_norm", max_norm)

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        factor = clip_factor(global_norm(updates), context.hyperparameters[bound.name])
        return {k: u * factor.to(u.dtype) for k, u in updates.items()}

    return stateless(update, by_name(bound), "clip_by_global_norm").with_extras(
        after_step=True, pools="the norm of all gradients"
    )
