"""A multiplier of the learning rate from the distance travelled: Prodigy's estimate (Mishchenko & Defazio, 2306.06101)
around any transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._step_size import around, check_rates, multiplied
from fusion_compile.optim._transform import (
    Context,
    Facts,
    Scalar,
    State,
    Transform,
    bound,
    declare,
    ones_like_scalar,
)

BETA3 = math.sqrt(0.999)
"""Prodigy's default: the root of Adam's usual β₂."""


class AutoscaleState(NamedTuple):
    """`start`, `s`: of the sampled entries, their initial values and the weighted sum of their gradients, by bank key
    (``<key>/sampled`` for a flat bank of which not every entry is sampled); 0-dim: `numerator`, `d` and `d_max`, and
    `multiplier`, that of the last update. `base`: the wrapped transform's state."""

    start: Tensors
    s: Tensors
    numerator: Tensor
    d: Tensor
    d_max: Tensor
    multiplier: Tensor
    base: State


def autoscale(
    base: Transform,
    *,
    d0: float | None = None,
    growth: Scalar = 1.02,
    beta3: Scalar = BETA3,
    coefficient: Scalar = 1.0,
    slice_p: int = 11,
    names: Sequence[str] = ("lr",),
) -> Transform:
    """Every rate in `names` times d / d0, where d, first d0, estimates how far the weights have to go.

    ``λ = d²/d0``; ``N ← β₃ N + λ ⟨g, p₀ - p⟩``; ``s ← β₃ s + λ g``; ``d̂ = coefficient · N / ‖s‖₁``;
    ``d_max ← max(d_max, d̂)``; ``d ← min(d_max, growth · d)``. An update is scaled by the d from before it. For a convex
    loss d̂ bounds ‖p₀ - p*‖∞ from below for any λ, so d is a size of one entry: `base` should move entries by about its
    lr (Adam, or a matrix update matched to it), and **d0 should be that lr**, which is what None takes (give the peak
    where the lr follows a schedule). lr / d0 is then Prodigy's lr, and stays live. With d0 = 1e-6 under an lr of 1e-3
    every step is a thousand times the estimate, which is how FusionOpt's autoscale diverges.

    All parameters share one d: wrap the partition. p is where g was taken (y, where `base` is Schedule-Free), or what
    this transform is given as parameters: z, inside a Schedule-Free one, whose average then does not know that later
    steps are longer; outside it does. N and s are kept for every `slice_p`-th entry
    of a matrix, or of a flat bank; the stride is raised until it has no divisor in common with any dimension, so that
    every row and column has its turn. `growth`, `beta3` and `coefficient` are live. 8 bytes a sampled parameter.

    Deviations from Prodigy: λ does not hold the lr, nor its warm-up; the moments and eps of `base` do not hold d;
    the first rise of d is bounded like every other. ``growth=inf`` gives Prodigy's d for the same iterates.
    """
    check_rates("autoscale", base, names)
    if d0 is None:
        first = base.hyperparameters[names[0]]
        if callable(first):
            raise ValueError(
                f"autoscale() takes d0 from {names[0]!r}, which follows a schedule ({first}); give d0, its peak."
            )
        d0 = float(first)
    if not 0 < d0 < math.inf:
        raise ValueError(f"d0={d0!r} is not a first estimate of a distance; give a positive number.")
    if not isinstance(slice_p, int) or isinstance(slice_p, bool) or slice_p < 1:
        raise ValueError(f"slice_p={slice_p!r} is not a stride; give a whole number, 1 for every entry.")
    return _build(base, d0, growth, beta3, coefficient, slice_p, tuple(names), {})


def coprime_stride(at_least: int, dimensions: Sequence[int]) -> int:
    """The smallest stride from `at_least` on that shares no divisor with any of `dimensions` (1 stays 1)."""
    stride = at_least
    while any([d > 0 and math.gcd(stride, d) > 1 for d in dimensions]):  # noqa: C419 - a generator is not captured
        stride += 1
    return stride


def _build(
    base: Transform,
    d0: float,
    growth: Scalar,
    beta3: Scalar,
    coefficient: Scalar,
    slice_p: int,
    names: tuple[str, ...],
    facts: Facts,
) -> Transform:
    limit, b3 = declare("autoscale_growth", growth), declare("autoscale_beta3", beta3)
    coef = declare("autoscale_coefficient", coefficient)
    known = {key: coprime_stride(slice_p, [d for m in f.members for d in m.shape]) for key, f in facts.items()}

    def sampled(banks: Tensors) -> Tensors:
        """Of every bank a view of the sampled entries: ``[..., q]`` of matrices, ``[q]`` of a flat bank."""
        samples = {}
        for key, bank in banks.items():
            if bank.ndim > 1:
                stride = coprime_stride(slice_p, bank.shape[-2:])
                samples[key] = bank.flatten(-2)[..., ::stride]
            else:
                stride = known[key] if key in known else coprime_stride(slice_p, bank.shape)
                samples[key if stride == 1 else f"{key}/sampled"] = bank.reshape(-1)[::stride]
        return samples

    def init(params: Tensors) -> AutoscaleState:
        start = {key: p.clone() for key, p in sampled(params).items()}
        one = ones_like_scalar(params)
        return AutoscaleState(
            start,
            {key: torch.zeros_like(p) for key, p in start.items()},
            torch.zeros_like(one),
            d0 * one,
            d0 * one,
            one,
            base.init(params),
        )

    def update(
        updates: Tensors, state: AutoscaleState, params: Tensors, context: Context
    ) -> tuple[Tensors, AutoscaleState]:
        h = context.hyperparameters
        point = params if base.gradient_point is None else base.gradient_point(params, state.base, context)
        g, p = sampled(updates), sampled(point)
        weight, beta3 = state.d / d0 * state.d, h[b3.name]
        zero = torch.zeros_like(state.d)
        s = {key: beta3 * state.s[key] + weight * g[key] for key in g}
        inner = sum(((g[key] * (state.start[key] - p[key])).sum(-1).sum() for key in g), zero)
        numerator = beta3 * state.numerator + weight * inner
        norm = sum((t.abs().sum(-1).sum() for t in s.values()), zero)
        estimate = torch.where(norm > 0, h[coef.name] * numerator / norm, zero)
        d_max = torch.maximum(state.d_max, estimate)
        d = torch.minimum(d_max, h[limit.name] * state.d)
        multiplier = state.d / d0
        scaled = multiplied(context, names, multiplier)
        updates, base_state = base.update(updates, state.base, params, scaled)
        start = {key: t.clone() for key, t in state.start.items()}  # an update returns values, never its arguments
        return updates, AutoscaleState(start, s, numerator, d, d_max, multiplier, base_state)

    def tells(state: AutoscaleState) -> dict[str, Tensor]:
        return {"comp/autoscale_mult": state.multiplier, "comp/autoscale_d": state.d}

    def bind(facts: Facts) -> Transform:
        return _build(bound(base, facts), d0, growth, beta3, coefficient, slice_p, names, facts)

    return around(base, init, update, (limit, b3, coef), "autoscale", tells, bind)
