"""Clipping by the global norm, arXiv 1211.5063 Algorithm 1, with torch.nn.utils.clip_grad_norm_'s 1e-6.

    g = g min(1, max_norm / (sqrt(sum over all tensors of ||g||^2) + 1e-6))

One factor for all tensors; the 1e-6 is torch's, not the paper's.
"""

import math

from tests.oracles.protocol import Given, Tensors, float64_copies


def global_norm(grads: Given) -> float:
    """The Euclidean norm of all tensors together."""
    return math.sqrt(sum(float((g**2).sum()) for g in float64_copies(grads).values()))


def clip_by_global_norm(grads: Given, max_norm: float) -> Tensors:
    """The gradients, all scaled by one factor at most 1."""
    factor = min(1.0, max_norm / (global_norm(grads) + 1e-6))
    return {name: factor * g for name, g in float64_copies(grads).items()}
