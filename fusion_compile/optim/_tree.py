"""Arithmetic on dictionaries of tensors: one verb for what is done to every bank alike.

The order of operations in each verb is part of its meaning: recipes are compared bit by bit with their sources.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusion_compile._types import Tensors


def map_tensors(fn: Callable[..., Tensor], first: Tensors, *rest: Tensors) -> Tensors:
    """``fn`` on the tensors of one key, for every key of `first`: ``{key: fn(first[key], rest[0][key], …)}``."""
    # A list: Dynamo does not capture a generator here.
    return {key: fn(t, *[tree[key] for tree in rest]) for key, t in first.items()}


def zeros_like(tree: Tensors) -> Tensors:
    """Zeros of the same shapes, dtypes and device."""
    return {key: torch.zeros_like(t) for key, t in tree.items()}


def copy(tree: Tensors) -> Tensors:
    """Every tensor in memory of its own: a transform returns values, never aliases of its arguments."""
    return {key: t.clone() for key, t in tree.items()}


def lerp(start: Tensors, end: Tensors, weight: Tensor) -> Tensors:
    """``start + weight (end - start)``, written out: Inductor decomposes `torch.lerp` with a select on every entry."""
    return {key: start[key] + weight * (t - start[key]) for key, t in end.items()}


def update_mean(mean: Tensors, sample: Tensors, beta: Tensor) -> Tensors:
    """Running mean as ``mean + (1 - beta) (sample - mean)``, the form of ``torch.optim``."""
    return {key: mean[key] + (1 - beta) * (t - mean[key]) for key, t in sample.items()}


def weighted_mean(mean: Tensors, sample: Tensors, beta: Tensor) -> Tensors:
    """Running mean as ``beta mean + (1 - beta) sample``, rounded otherwise than `update_mean`."""
    return {key: beta * mean[key] + (1 - beta) * t for key, t in sample.items()}


def update_mean_square(mean: Tensors, sample: Tensors, beta: Tensor) -> Tensors:
    """Adam's second moment, ``mean beta + (1 - beta) sample sample``."""
    return {key: mean[key] * beta + (1 - beta) * t * t for key, t in sample.items()}


def number_like(tree: Tensors, value: float) -> Tensor:
    """A new 0-dim tensor on the device of `tree` and in its dtype; fp32 on the CPU if `tree` is empty."""
    for t in tree.values():
        return torch.full((), value, dtype=t.dtype, device=t.device)
    return torch.full((), float(value))


def count_like(tree: Tensors) -> Tensor:
    """A new count, 0: 0-dim, int64, on the device of `tree`. In fp32 a count stands still at 2^24."""
    return number_like(tree, 0.0).to(torch.int64)


def sum_like(tree: Tensors) -> Tensor:
    """A new sum over all steps, 0: 0-dim, fp64, on the device of `tree`.

    In fp32 a sum of n equal numbers grows by the wrong amount from about n = 10^6 on, and by nothing from 2^24 on.
    """
    return number_like(tree, 0.0).to(torch.float64)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a + b`` rounded, and what the rounding took from it, exactly (Knuth). Reordered sums would spoil it."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
