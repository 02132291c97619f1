"""Parts shared by preconditioners that keep one factor for the rows and one for the columns of each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import Work, wrap
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import SPECTRAL, Extras, Number, Periodic, Transform, check_transform, declare
from fusion_compile.optim._tree import map_tensors, number_like, update_mean
from fusion_compile.optim.clip_by_global_norm import global_norm
from fusion_compile.optim.scale_by_momentum import scale_by_momentum


def base_or_mean(what: str, base: Transform | None, beta: Number) -> Transform:
    """The map from gradient to update: `base`, or the running mean ``lerp(mu, g, 1 - beta)``."""
    if base is None:
        return scale_by_momentum(declare("beta1", beta))
    check_transform(f"{what}(), base,", base)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} moves the gradient point; put {what}() inside it, not around it.")
    return base


def periodic(name: str, every: int, update: Work, first: Work) -> Periodic:
    """`Periodic` with `every` checked."""
    if every < 1:
        raise ValueError(f"every={every} is not a number of updates; use 1 or more.")
    return Periodic(name, every, update, first)


def preconditioner(
    what: str,
    base: Transform | None,
    mean: Transform,
    numbers: Mapping[str, float | Schedule],
    own: Periodic,
    rebuild: Callable[[Transform], Transform],
) -> Extras:
    """The extras of a preconditioner around `base` (around `mean` if that is None), whose gain is a diagnostic."""

    def diagnostics(state: Any) -> dict[str, Tensor]:
        return {"comp/shampoo_gain": state.gain}

    name = what if base is None else f"{what}({base.name})"
    extras = wrap(mean, name, numbers, diagnostics=diagnostics, rebuild=None if base is None else rebuild)
    roles = tuple(dict.fromkeys((SPECTRAL, *extras.roles)))
    return extras._replace(roles=roles, periodic=(*extras.periodic, own))


def zero_factors(params: Tensors, what: str) -> tuple[Tensors, Tensors]:
    """Zeros ``[..., m, m]`` and ``[..., n, n]`` for matrices ``[..., m, n]``. ValueError for what is not a matrix."""
    for k, p in params.items():
        if p.ndim < 2:
            raise ValueError(f"{what}() preconditions matrices; {k!r} has shape {tuple(p.shape)}. Give it to AdamW.")
    left = map_tensors(lambda p: p.new_zeros(*p.shape[:-1], p.size(-2)), params)
    return left, map_tensors(lambda p: p.new_zeros(*p.shape[:-2], p.size(-1), p.size(-1)), params)


def mean_factors(left: Tensors, right: Tensors, gradients: Tensors, beta: Tensor) -> tuple[Tensors, Tensors]:
    """The running means of G Gᵀ and Gᵀ G."""
    rows = map_tensors(lambda g: g @ g.mT, gradients)
    columns = map_tensors(lambda g: g.mT @ g, gradients)
    return update_mean(left, rows, beta), update_mean(right, columns, beta)


def eye_like(s: Tensor) -> Tensor:
    """An identity for every square matrix of `s`, in memory of its own."""
    return torch.eye(s.size(-1), dtype=s.dtype, device=s.device).expand_as(s).clone()


def gain_of(after: Tensors, before: Tensors) -> Tensor:
    """``‖after‖ / ‖before‖`` over all matrices, 0-dim; 0 if nothing came in."""
    gain = global_norm(after) / above_zero(global_norm(before))
    return gain.to(number_like(before, 1.0).dtype)


def above_zero(norm: Tensor) -> Tensor:
    """`norm`, or the smallest normal number if it is zero: what can be divided by."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)
