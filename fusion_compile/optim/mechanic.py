"""Mechanic: a scale for the whole displacement of any optimizer, tuned while it runs (Cutkosky et al., 2306.00144)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import BankInfos, Context, State, Transform, bound, check_transform
from fusion_compile.optim._tree import copy, count_like, number_like

CALM = 50
"""Updates in which S stood still, after which ``freeze="auto"`` keeps it."""
BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


class MechanicState(NamedTuple):
    """`start`: the first weights. By the index of each β, 0-dim: `largest` and `squares` of h, `wealth` and `share`,
    its part of S. 0-dim: `scale`, S of the last update, and `highest`, its largest; `unit`, what `s_init` is a multiple
    of; `calm`, updates in which S stood still. `base`: the wrapped transform's state."""

    start: Tensors
    largest: Tensors
    squares: Tensors
    wealth: Tensors
    share: Tensors
    scale: Tensor
    highest: Tensor
    unit: Tensor
    calm: Tensor
    base: State


class _Options(NamedTuple):
    """What is fixed when the program is built. `freeze`: updates after which S stands still, 0 for never; `by_calm`:
    only updates count in which it stood still already."""

    s_init: float
    decay: float
    betas: tuple[float, ...]
    eps: float
    relative: bool
    bounds: tuple[float, float]
    freeze: int
    by_calm: bool


def mechanic(
    base: Transform,
    *,
    s_init: float = 1e-6,
    decay: float = 1e-2,
    betas: tuple[float, ...] = BETAS,
    eps: float = 1e-8,
    relative: bool = False,
    bounds: tuple[float, float] = (0.0, math.inf),
    freeze: int | str | None = None,
) -> Transform:
    """``p ← p₀ + S Δ``, where Δ is the sum of what `base` would have moved, and S is learned from ``h = ⟨g, Δ⟩``.

    For each β: ``m ← max(β m, |h|)``, ``v ← β² v + h²``, ``r ← max(0, β r - s h)``; ``s = (s_init m / n + r) / (√v +
    eps)`` with n betas, and S is the sum of all s. h also holds ``decay S ‖g‖ / ‖p‖ ⟨p, Δ⟩``. Δ is not kept: it is
    ``(p - p₀) / S``. All parameters share S; groups of a training step have one each. 4 bytes a parameter. Diagnostics:
    ``comp/mechanic_s``, and ``comp/mechanic_frozen``, 1 once S is kept.
    Source: 2306.00144, algorithm 2 and its published code. Deviations: the first update has S = s_init.

    Args:
        base: Takes a step; its lr is a shape (a schedule around 1), because S scales it. A decay inside acts as `base`
            means it, scaled by S.
        s_init: The scale to start from, far below any that could be right.
        decay: λ, the pull of h towards the origin.
        betas: Memories of the six tuners.
        eps: Added to roots and to S where it divides.
        relative: Whether `s_init` is a share of the root mean square of all first weights.
        bounds: S is at least ``bounds[0]`` of its largest value so far and at most ``bounds[1]`` times the scale to
            start from.
        freeze: After so many updates S is kept, and the step is S times that of `base`. ``"auto"``: after 50 in a row
            in which S changed by less than 2 % and was at least 0.9 of its largest. None: never. `p₀` stays in memory.

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
    if not 0 < s_init < math.inf or not betas or not all(0 <= b <= 1 for b in betas):
        raise ValueError(f"s_init={s_init!r}, betas={betas!r}: give a positive scale and decays from 0 to 1.")
    if not 0 <= bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"bounds={bounds!r}: give a share of the largest scale, 0 to 1, and a multiple of the first.")
    by_calm = freeze == "auto"
    updates = CALM if freeze == "auto" else freeze
    if updates is not None and (not isinstance(updates, int) or isinstance(updates, bool) or updates < 1):
        raise ValueError(f"freeze={freeze!r} is not known; give a number of updates, 'auto' or None.")
    return _mechanic(base, _Options(s_init, decay, betas, eps, relative, bounds, updates or 0, by_calm), 0)


def _mechanic(base: Transform, options: _Options, entries: int) -> Transform:
    """`entries`: of all parameters, 0 where they are not known; banks may be padded with zeros."""
    count, least, most = len(options.betas), *options.bounds

    def init(params: Tensors) -> MechanicState:
        def numbers() -> Tensors:
            return {str(i): number_like(params, 0.0) for i in range(count)}

        zero, unit = number_like(params, 0.0), number_like(params, 1.0)
        if options.relative:
            size = entries or max(sum(p.numel() for p in params.values()), 1)
            unit = (total([p * p for p in params.values()], zero) / size).sqrt()
        start, base_state = copy(params), base.init(params)
        scales = (zero, zero.clone(), unit, count_like(params))
        return MechanicState(start, numbers(), numbers(), numbers(), numbers(), *scales, base_state)

    def update(
        updates: Tensors, state: MechanicState, params: Tensors, context: Context
    ) -> tuple[Tensors, MechanicState]:
        moved, inside = base.update(updates, state.base, params, context)
        scale, zero = state.scale, torch.zeros((), dtype=state.scale.dtype)
        seed = options.s_init * state.unit
        delta = {k: (p - state.start[k]) / (scale + options.eps) for k, p in params.items()}
        size = total([p * p for p in params.values()], zero).sqrt()
        norm = total([g * g for g in updates.values()], zero).sqrt()
        pull = options.decay * scale * norm / (size + options.eps)
        h = total([delta[k] * (g + pull * params[k]) for k, g in updates.items()], zero)
        largest: Tensors = {}
        squares: Tensors = {}
        wealth: Tensors = {}
        share: Tensors = {}
        first = (scale == 0).to(scale.dtype) * (seed / count)
        for i, beta in enumerate(options.betas):
            at = str(i)
            largest[at] = torch.maximum(beta * state.largest[at], h.abs())
            squares[at] = beta * beta * state.squares[at] + h * h
            wealth[at] = (beta * state.wealth[at] - state.share[at] * h).clamp(min=0)
            # Before the first displacement h is 0, and so would every share be.
            share[at] = (seed * largest[at] / count + wealth[at]) / (squares[at].sqrt() + options.eps) + first
        now = torch.maximum(torch.minimum(torch.stack(list(share.values())).sum(), most * seed), least * state.highest)
        after = {k: state.start[k] + now * (delta[k] + moved[k]) for k in params}
        moves = {k: after[k] - p for k, p in params.items()}
        calm = state.calm + 1
        if options.freeze:
            frozen = state.calm >= options.freeze
            now = torch.where(frozen, scale, now)
            moves = {k: torch.where(frozen, now * moved[k], move) for k, move in moves.items()}
        if options.by_calm:
            stands = ((now - scale).abs() < 0.02 * scale) & (now >= 0.9 * state.highest)
            calm = torch.where(stands, calm, torch.zeros_like(calm))
        start, unit = {k: 1 * t for k, t in state.start.items()}, 1 * state.unit
        scales = (now, torch.maximum(state.highest, now), unit, calm)
        return moves, MechanicState(start, largest, squares, wealth, share, *scales, inside)

    def diagnostics(state: MechanicState) -> Mapping[str, Tensor]:
        shown = {"comp/mechanic_s": state.scale}
        if options.freeze:
            shown["comp/mechanic_frozen"] = (state.calm >= options.freeze).to(state.scale.dtype)
        return shown

    def bind(infos: BankInfos) -> Transform:
        known = sum(place.numel for info in infos.values() for place in info.places)
        return _mechanic(bound(base, infos), options, known)

    extras = wrap(base, f"mechanic({base.name})", {}, diagnostics=diagnostics)
    return Transform(init, update, extras._replace(bind=bind, pools="its scale, which all gradients teach,"))
