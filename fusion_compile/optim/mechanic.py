"""Mechanic: a scale for the whole displacement of any optimizer, tuned while it runs (Cutkosky et al., 2306.00144)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import Context, State, Transform, check_transform
from fusion_compile.optim._tree import copy, number_like

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


class MechanicState(NamedTuple):
    """`start`: the first weights. By the index of each β, 0-dim: `largest` and `squares` of h, `wealth` and `share`,
    its part of S. `scale`: S of the last update, 0-dim. `base`: the wrapped transform's state."""

    start: Tensors
    largest: Tensors
    squares: Tensors
    wealth: Tensors
    share: Tensors
    scale: Tensor
    base: State


def mechanic(
    base: Transform, *, s_init: float = 1e-6, decay: float = 1e-2, betas: tuple[float, ...] = BETAS, eps: float = 1e-8
) -> Transform:
    """``p ← p₀ + S Δ``, where Δ is the sum of what `base` would have moved, and S is learned from ``h = ⟨g, Δ⟩``.

    For each β: ``m ← max(β m, |h|)``, ``v ← β² v + h²``, ``r ← max(0, β r - s h)``; ``s = (s_init m / n + r) / (√v +
    eps)`` with n betas, and S is the sum of all s. h also holds ``decay S ‖g‖ / ‖p‖ ⟨p, Δ⟩``. Δ is not kept: it is
    ``(p - p₀) / S``. All parameters share S; groups of a training step have one each. 4 bytes a parameter. Diagnostic:
    ``comp/mechanic_s``.
    Source: 2306.00144, algorithm 2 and its published code. Deviations: the first update has S = s_init.

    Args:
        base: Takes a step; its lr is a shape (a schedule around 1), because S scales it. A decay inside acts as `base`
            means it, scaled by S.
        s_init: The scale to start from, far below any that could be right.
        decay: λ, the pull of h towards the origin.
        betas: Memories of the six tuners.
        eps: Added to roots and to S where it divides.

    Returns:
        A transform that takes a step, with the roles and numbers of `base`.

    Raises:
        ValueError: `base` takes no step, or moves the gradient point; a number is out of its range.

    Example:
        >>> from fusion_compile import optim
        >>> optim.mechanic(optim.adamw(1.0, weight_decay=0.0)).descends
        True
    """
    check_transform("mechanic(), base,", base)
    if not base.descends:
        raise ValueError(
            f"mechanic() scales steps, and {base.name} takes none; end it with scale_by_learning_rate(1.0)."
        )
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} moves the gradient point, and h belongs to the weights; wrap what it wraps.")
    if not 0 < s_init < float("inf") or not betas or not all(0 <= b <= 1 for b in betas):
        raise ValueError(f"s_init={s_init!r}, betas={betas!r}: give a positive scale and decays from 0 to 1.")
    count = len(betas)

    def init(params: Tensors) -> MechanicState:
        def numbers() -> Tensors:
            return {str(i): number_like(params, 0.0) for i in range(count)}

        zero = number_like(params, 0.0)
        return MechanicState(copy(params), numbers(), numbers(), numbers(), numbers(), zero, base.init(params))

    def update(
        updates: Tensors, state: MechanicState, params: Tensors, context: Context
    ) -> tuple[Tensors, MechanicState]:
        moved, inside = base.update(updates, state.base, params, context)
        scale, zero = state.scale, torch.zeros((), dtype=state.scale.dtype)
        delta = {k: (p - state.start[k]) / (scale + eps) for k, p in params.items()}
        size = total([p * p for p in params.values()], zero).sqrt()
        norm = total([g * g for g in updates.values()], zero).sqrt()
        pull = decay * scale * norm / (size + eps)
        h = total([delta[k] * (g + pull * params[k]) for k, g in updates.items()], zero)
        largest: Tensors = {}
        squares: Tensors = {}
        wealth: Tensors = {}
        share: Tensors = {}
        first = (scale == 0).to(scale.dtype) * (s_init / count)
        for i, beta in enumerate(betas):
            at = str(i)
            largest[at] = torch.maximum(beta * state.largest[at], h.abs())
            squares[at] = beta * beta * state.squares[at] + h * h
            wealth[at] = (beta * state.wealth[at] - state.share[at] * h).clamp(min=0)
            # Before the first displacement h is 0, and so would every share be.
            share[at] = (s_init * largest[at] / count + wealth[at]) / (squares[at].sqrt() + eps) + first
        now = torch.stack(list(share.values())).sum()
        after = {k: state.start[k] + now * (delta[k] + moved[k]) for k in params}
        moves = {k: after[k] - p for k, p in params.items()}
        start = {k: 1 * t for k, t in state.start.items()}
        return moves, MechanicState(start, largest, squares, wealth, share, now, inside)

    def diagnostics(state: MechanicState) -> Mapping[str, Tensor]:
        return {"comp/mechanic_s": state.scale}

    def rebuild(base: Transform) -> Transform:
        return mechanic(base, s_init=s_init, decay=decay, betas=betas, eps=eps)

    return Transform(init, update, wrap(base, f"mechanic({base.name})", {}, diagnostics=diagnostics, rebuild=rebuild))
