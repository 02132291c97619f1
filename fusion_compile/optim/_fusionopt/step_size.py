"""FusionOpt's step size: a clamped ratio of loss to gradient, Prodigy's distance as a multiplier, and a schedule.

Everything is 0-dim and on the device; the schedule runs on the count of steps in the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._fusionopt.banked_parameters import BankedParameters
from fusion_compile.optim._total import total
from fusion_compile.optim._tree import copy, number_like, zeros_like

DECAYS = ("cosine", "linear", "wsd")


@dataclass(frozen=True)
class Shape:
    """Warm-up and decay as factors of the step size; `decay`: one of DECAYS or None."""

    warmup_steps: int
    decay: str | None
    total_steps: int | None
    decay_min: float
    decay_start: float

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative; give 0 for no warm-up.")
        if self.decay is None:
            return
        if self.decay not in DECAYS:
            raise ValueError(
                f"decay_schedule={self.decay!r} is not known; use None or one of {', '.join(map(repr, DECAYS))}."
            )
        if not self.total_steps or self.total_steps < 0:
            raise ValueError(
                f"decay_schedule={self.decay!r} needs the number of steps; got total_steps={self.total_steps}."
            )

    def warm(self, step_count: Tensor) -> Tensor:
        """``(step_count + 1) / warmup_steps``, at most 1; in fp64, as `decayed`."""
        if self.warmup_steps == 0:
            return torch.ones_like(step_count, dtype=torch.float64)
        return ((step_count.double() + 1) / self.warmup_steps).clamp(max=1.0)

    def decayed(self, step_count: Tensor) -> Tensor:
        """1 during the warm-up, `decay_min` from `total_steps` on. Cosine and linear run over the steps between, wsd
        over the last ``1 - decay_start`` of all steps."""
        if self.decay is None or self.total_steps is None:
            return torch.ones_like(step_count, dtype=torch.float64)
        # In fp64: near its end a cosine is 1e-4 or less, a difference of numbers near 1.
        k = step_count.double()
        done = ((k - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)).clamp(0.0, 1.0)
        if self.decay == "cosine":
            left = 0.5 * (1 + torch.cos(math.pi * done))
        elif self.decay == "linear":
            left = 1 - done
        else:
            of_all = (k / self.total_steps).clamp(0.0, 1.0)
            left = (1 - (of_all - self.decay_start) / max(1e-12, 1 - self.decay_start)).clamp(0.0, 1.0)
            left = torch.where(k < self.warmup_steps, torch.ones_like(left), left)
        return self.decay_min + (1 - self.decay_min) * left


class PolyakState(NamedTuple):
    """`gnorm_ema`: of the mean |g| over all entries; `loss_ema`: of the loss. 0-dim, started at the first value."""

    gnorm_ema: Tensor
    loss_ema: Tensor


def polyak_ratio(
    grads: Tensors,
    state: PolyakState,
    parameters: BankedParameters,
    loss: Tensor | None,
    is_first: Tensor,
    numbers: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, PolyakState]:
    """``clamp(loss_ema / (gnorm_ema + 1e-12), γ_min, γ_max)``; without a loss the ratio is 1. `numbers`: β_p, γ_min,
    γ_max."""
    beta, least, most = numbers
    one = torch.ones_like(state.gnorm_ema)

    def averaged(ema: Tensor, value: Tensor) -> Tensor:
        return torch.where(is_first, value, beta * ema + (1 - beta) * value)

    absolute = total([g.abs() for g in grads.values()], torch.zeros_like(one))
    entries = sum([parameters.count(key, g) for key, g in grads.items()])
    gnorm = averaged(state.gnorm_ema, absolute / max(1, entries))
    if loss is None:
        return one.clamp(least, most), PolyakState(gnorm, state.loss_ema.clone())
    loss_ema = averaged(state.loss_ema, loss.to(one.dtype))
    return (loss_ema / (gnorm + 1e-12)).clamp(least, most), PolyakState(gnorm, loss_ema)


class AutoscaleState(NamedTuple):
    """`d`, `d_max`, `numerator`: 0-dim. `start`, `s`: initial weights and sum of gradients at the sampled entries."""

    d: Tensor
    d_max: Tensor
    numerator: Tensor
    start: Tensors
    s: Tensors


@dataclass(frozen=True)
class Autoscale:
    """Prodigy's estimate of the distance to the solution (2306.06101) with its lr at 1, as the multiplier d / d0.

    ``N ← β₃ N + f ⟨g, p₀ - p⟩; s ← β₃ s + f g; d̂ = coef · N / Σ|s|`` with f = d²/d0, over one entry in `every` of all
    parameters; d is the largest d̂ so far, in one step at most `growth` times the last. While Σ|s| is zero, N and d
    stay.
    """

    parameters: BankedParameters
    d0: float
    coef: float
    growth: float
    every: int
    beta3: float

    def init(self, params: Tensors) -> AutoscaleState:
        """d = d0, nothing summed, and the sampled entries of `params` as the start."""
        d, d_max, numerator = (number_like(params, value) for value in (self.d0, self.d0, 0.0))
        start = {k: self.parameters.sampled(k, p, self.every) for k, p in params.items()}
        return AutoscaleState(d, d_max, numerator, start, zeros_like(start))

    def update(self, grads: Tensors, point: Tensors, state: AutoscaleState) -> tuple[Tensor, AutoscaleState]:
        """The multiplier d / d0 of this step, from the gradients at the weights `point`."""
        f = state.d * state.d / self.d0
        products: list[Tensor] = []
        s: Tensors = {}
        for key, g in grads.items():
            sample = self.parameters.sampled(key, g, self.every)
            moved = state.start[key] - self.parameters.sampled(key, point[key], self.every)
            s[key] = self.beta3 * state.s[key] + f * sample
            products.append(sample * moved)
        inner = total(products, torch.zeros_like(state.d))
        size = total([t.abs() for t in s.values()], torch.zeros_like(state.d))
        known = size > 0
        numerator = torch.where(known, self.beta3 * state.numerator + f * inner, state.numerator)
        estimate = self.coef * numerator / torch.where(known, size, torch.ones_like(size))
        d_max = torch.where(known, torch.maximum(state.d_max, estimate), state.d_max)
        started = torch.where(state.d == self.d0 * torch.ones_like(state.d), torch.maximum(state.d, estimate), state.d)
        d = torch.where(known, torch.minimum(d_max, started * self.growth), state.d)
        return d / self.d0, AutoscaleState(d, d_max, numerator, copy(state.start), s)
