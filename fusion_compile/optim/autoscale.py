"""A multiplier of the learning rate from the distance travelled: Prodigy's estimate (Mishchenko & Defazio, 2306.06101)
around any transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._step_size import check_rates, multiplied
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import (
    BankInfos,
    Context,
    Number,
    State,
    Transform,
    bound,
    by_name,
    declare,
)
from fusion_compile.optim._tree import copy, number_like, sum_like, two_sum, zeros_like

BETA3 = math.sqrt(0.999)
"""Prodigy's default: the root of Adam's usual β₂."""


class AutoscaleState(NamedTuple):
    """`start`, `s`: initial values of the sampled entries and the weighted sum of their gradients, by bank key
    (``<key>/sampled`` for a flat bank of which not every entry is sampled); `lost`: what rounding took from `s`; 0-dim:
    `numerator` (fp64), `d` and `d_max`, and `multiplier`, that of the last update. `base`: the wrapped transform's
    state."""

    start: Tensors
    s: Tensors
    lost: Tensors
    numerator: Tensor
    d: Tensor
    d_max: Tensor
    multiplier: Tensor
    base: State


def autoscale(
    base: Transform,
    *,
    d0: float | None = None,
    growth: Number = 1.02,
    beta3: Number = BETA3,
    coefficient: Number = 1.0,
    slice_p: int = 11,
    names: Sequence[str] = ("lr",),
) -> Transform:
    """Multiply every rate in `names` by d / d0, where d, first d0, estimates how far the weights have to go.

    ``λ = d²/d0``; ``N ← β₃ N + λ ⟨g, p₀ - p⟩``; ``s ← β₃ s + λ g``; ``d̂ = coefficient · N / ‖s‖₁``;
    ``d_max ← max(d_max, d̂)``; ``d ← min(d_max, growth · d)``. An update is scaled by the d from before it. For a convex
    loss d̂ bounds ‖p₀ - p*‖∞ from below for any λ, so d is a size of one entry.

    All parameters share one d: wrap the partition. p is the point at which g was taken (y, if `base` is Schedule-Free),
    or the parameters that this transform is given: inside a Schedule-Free transform they are z, and its average then
    does not know that later steps are longer; outside it does. N and s are kept for every `slice_p`-th entry of a
    matrix, or of a flat bank. The stride is raised until it has no divisor in common with any dimension, so that every
    row and column is sampled. With β₃ = 1 they are sums that run for ever, and one in fp32 would stand
    still once it is 2^24 times what comes in: N is fp64, and s keeps what rounding took from it (two-sum). 12 bytes a
    sampled parameter. Diagnostics: ``comp/autoscale_mult``, ``comp/autoscale_d``.

    Source: Prodigy (2306.06101). Deviations: λ does not hold the lr, nor its warm-up; the moments and eps of `base` do
    not hold d; the first rise of d is bounded like every other. ``growth=inf`` gives Prodigy's d for the same iterates.

    Args:
        base: Should move entries by about its lr (Adam, or a matrix update matched to it).
        d0: First estimate, in the unit of the weights. It **should be the lr** of `base`, which None takes (give the
            peak if the lr follows a schedule). lr / d0 is then Prodigy's lr, and stays live. With d0 = 1e-6 under an lr
            of 1e-3 every step is a thousand times the estimate, which is how FusionOpt's autoscale diverges.
        growth: Largest factor by which d may grow in one update. Live as ``autoscale_growth``.
        beta3: β₃, decay of N and s. Live as ``autoscale_beta3``.
        coefficient: Factor on d̂. Live as ``autoscale_coefficient``.
        slice_p: Sample every so many entries; 1 for all.
        names: Hyperparameters of `base` that are multiplied.

    Returns:
        `base` with scaled rates; it takes a step if `base` does.

    Raises:
        ValueError: `base` does not read one of `names`; `d0` is None and the rate follows a schedule; `d0` is not
            positive; `slice_p` is not a stride.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.autoscale(optim.adamw(1e-4))
        >>> optimizer.hyperparameters["autoscale_growth"]
        1.02
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
    growth: Number,
    beta3: Number,
    coefficient: Number,
    slice_p: int,
    names: tuple[str, ...],
    infos: BankInfos,
) -> Transform:
    limit, b3 = declare("autoscale_growth", growth), declare("autoscale_beta3", beta3)
    coef = declare("autoscale_coefficient", coefficient)
    known = {key: coprime_stride(slice_p, [d for p in info.places for d in p.shape]) for key, info in infos.items()}

    def sampled(banks: Tensors) -> Tensors:
        """A view of the sampled entries of every bank: ``[..., q]`` of matrices, ``[q]`` of a flat bank."""
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
        start = copy(sampled(params))
        d, d_max, multiplier = (number_like(params, value) for value in (d0, d0, 1.0))
        s, lost = zeros_like(start), zeros_like(start)
        return AutoscaleState(start, s, lost, sum_like(params), d, d_max, multiplier, base.init(params))

    def update(
        updates: Tensors, state: AutoscaleState, params: Tensors, context: Context
    ) -> tuple[Tensors, AutoscaleState]:
        h = context.hyperparameters
        point = params if base.gradient_point is None else base.gradient_point(params, state.base, context)
        g, p = sampled(updates), sampled(point)
        weight, beta3 = state.d / d0 * state.d, h[b3.name]
        zero = torch.zeros_like(state.numerator)
        s, lost = {}, {}
        for key, t in g.items():
            s[key], lost[key] = two_sum(beta3 * state.s[key], beta3 * state.lost[key] + weight * t)
        inner = total([g[key] * (state.start[key] - p[key]) for key in g], torch.zeros_like(state.d))
        numerator = beta3 * state.numerator + weight * inner
        norm = total([t.abs() for t in s.values()], zero)
        estimate = torch.where(norm > 0, h[coef.name] * numerator / norm, zero).to(state.d.dtype)
        d_max = torch.maximum(state.d_max, estimate)
        d = torch.minimum(d_max, h[limit.name] * state.d)
        multiplier = state.d / d0
        scaled = multiplied(context, names, multiplier)
        updates, base_state = base.update(updates, state.base, params, scaled)
        return updates, AutoscaleState(copy(state.start), s, lost, numerator, d, d_max, multiplier, base_state)

    def diagnostics(state: AutoscaleState) -> dict[str, Tensor]:
        return {"comp/autoscale_mult": state.multiplier, "comp/autoscale_d": state.d}

    def bind(infos: BankInfos) -> Transform:
        return _build(bound(base, infos), d0, growth, beta3, coefficient, slice_p, names, infos)

    extras = wrap(base, f"autoscale({base.name})", by_name(limit, b3, coef), diagnostics=diagnostics)
    return Transform(init, update, extras._replace(bind=bind, pools="d, which sums over all gradients estimate,"))
