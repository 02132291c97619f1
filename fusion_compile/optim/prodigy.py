"""Prodigy: Adam whose step is an estimate of the distance to go (Mishchenko & Defazio, 2306.06101)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._compat import mark_static
from fusion_compile._types import Tensors
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    MATRIX,
    BankInfos,
    Context,
    Extras,
    Number,
    Place,
    Transform,
    by_name,
    declare,
    declare_betas,
    pair_of,
)
from fusion_compile.optim._tree import number_like, sum_like, zeros_like
from fusion_compile.optim.average_steps import keeps_average
from fusion_compile.optim.codecs.all_codecs import codec_of
from fusion_compile.optim.scale_by_factored_rms import inverse_root
from fusion_compile.optim.stored import stored_as

FACTORED_EPS = 1e-30
"""Added to squares of a factored second moment."""


class ProdigyState(NamedTuple):
    """`mu`, `nu`: moments of d g, shaped like the parameters; `mu` is empty for β₁ = 0. Where the second moment is
    factored, `nu` has the vectors alone, and `row` and `column` are means of g² for each row and column. `start`: the
    first weights, `s`: the weighted sum of gradients, both by bank key, or ``<key>/sampled`` where not every entry is
    kept. 0-dim, fp64: `d`, `d_max` and `numerator`; 0-dim: `beta1_power`, `beta2_power`, and `rate`, d lr of the last
    update."""

    mu: Tensors
    nu: Tensors
    row: Tensors
    column: Tensors
    start: Tensors
    s: Tensors
    d: Tensor
    d_max: Tensor
    numerator: Tensor
    beta1_power: Tensor
    beta2_power: Tensor
    rate: Tensor


class _Options(NamedTuple):
    """What is fixed when the program is built."""

    d0: float
    beta3: float | None
    limit: float
    slice_p: int
    safeguard: bool
    corrects: bool
    decouple: bool
    factored: bool
    bounds_root: bool


def prodigy(
    lr: Number = 1.0,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    d0: float = 1e-6,
    d_coef: Number = 1.0,
    growth_rate: Number = math.inf,
    d_limit: float = math.inf,
    beta3: float | None = None,
    slice_p: int = 1,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    decouple: bool = True,
    bounds_root: bool = False,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """Adam with step d lr, where d estimates ‖p₀ - p*‖∞ from below and grows from `d0`.

    ``N ← β₃ N + (d / d0) d lr ⟨g, p₀ - p⟩``; ``s ← β₃ s + (d / d0) d lr g``; ``d̂ = d_coef N / ‖s‖₁``; d follows the
    largest d̂. Moments are of d g. All parameters share one d; groups of a training step have one each. d is computed on
    the device, so nothing waits. 16 bytes a parameter, 8 + 8 / slice_p with slices, fewer with codecs. Diagnostics:
    ``comp/prodigy_d``, ``comp/prodigy_lr`` (d lr).
    Source: 2306.06101, ``prodigyopt`` 1.1.2, whose trajectory it follows. Deviations: groups of a training step have a
    d each, there one; `d_limit`; lr = 0 leaves everything as it is, d's past included.

    Args:
        lr: Factor on d; 1, or a schedule around it.
        betas: Decay of the moments, live as ``beta1`` and ``beta2``. β₁ = 0, the number, keeps no first moment.
        eps: Times d, added to the root of the second moment.
        weight_decay: Per unit of d lr.
        d0: First estimate, far below the distance.
        d_coef: Factor on d̂. Live.
        growth_rate: Largest factor by which d may grow in one update. Live.
        d_limit: Upper bound on d.
        beta3: Decay of N and s; None is √β₂.
        slice_p: N and s see every so manyth entry of each parameter; 11 is usual, 1 is all.
        use_bias_correction: Whether d lr is multiplied by Adam's corrections, a warm-up of the rate.
        safeguard_warmup: Whether lr is left out of s, so that a warm-up of lr does not inflate d̂.
        decouple: False adds the decay to the gradient.
        bounds_root: Whether d eps is the least root of the second moment, as in K-Optimizers' KProdigy, and not added.
        momentum: Codec of the first moment; see `stored`.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``. ``"factored"``: of matrices
            one number a row and a column, 4 (m + n) bytes a matrix (K-Optimizers' KProdigy).

    Returns:
        A complete optimizer for parameters of any shape; for ``"matrix"`` and ``"scalar"`` with a factored moment.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: An option is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.prodigy(slice_p=11, momentum="int8").hyperparameters["lr"]
        1.0
    """
    if not 0 < d0 < math.inf or not d0 <= d_limit:
        raise ValueError(f"d0={d0!r} with d_limit={d_limit!r}: give a positive first estimate, not above the limit.")
    if not isinstance(slice_p, int) or isinstance(slice_p, bool) or slice_p < 1:
        raise ValueError(f"slice_p={slice_p!r} is not a stride; give a whole number, 1 for every entry.")
    if beta3 is not None and not 0 <= beta3 <= 1:
        raise ValueError(f"beta3={beta3!r} is the decay of sums; give 0 to 1, or None for √β₂.")
    factored = second_moment == "factored"
    options = _Options(
        d0, beta3, d_limit, slice_p, safeguard_warmup, use_bias_correction, decouple, factored, bounds_root
    )
    second_moment = "fp32" if factored else second_moment
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "d_coef": d_coef, "growth_rate": growth_rate}
    whole = _prodigy(numbers, pair_of(betas), options, {})
    if keeps_average(pair_of(betas)[0]):
        return stored_as(whole, momentum, second_moment)
    codec_of("momentum", momentum)
    return stored_as(whole, second_moment=second_moment)


def _prodigy(
    given: Mapping[str, Number], betas: tuple[Number, Number], options: _Options, infos: BankInfos
) -> Transform:
    named = {name: declare(name, value) for name, value in given.items()}
    keeps = keeps_average(betas[0])
    b1, b2 = declare_betas(betas)
    samples = {key: _Sample(info.places, options.slice_p) for key, info in infos.items()}

    def sampled(banks: Tensors) -> Tensors:
        if options.slice_p == 1:
            return banks
        return {f"{k}/sampled": samples.get(k, _Sample((), options.slice_p)).of(t) for k, t in banks.items()}

    def factors(t: Tensor) -> bool:
        return options.factored and t.ndim > 1

    def init(params: Tensors) -> ProdigyState:
        for k, p in params.items():
            if k in samples and options.slice_p > 1:
                samples[k].prepare(p)
        start = {k: t.clone() for k, t in sampled(params).items()}
        one = sum_like(params) + 1.0
        d = sum_like(params) + options.d0
        return ProdigyState(
            zeros_like(params) if keeps else {},
            {k: torch.zeros_like(p) for k, p in params.items() if not factors(p)},
            {k: p.new_zeros((*p.shape[:-1], 1)) for k, p in params.items() if factors(p)},
            {k: p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) for k, p in params.items() if factors(p)},
            start,
            zeros_like(start),
            d,
            d.clone(),
            sum_like(params),
            one,
            one.clone(),
            number_like(params, 0.0),
        )

    def update(
        updates: Tensors, state: ProdigyState, params: Tensors, context: Context
    ) -> tuple[Tensors, ProdigyState]:
        h = context.hyperparameters
        lr, eps, decay = h[named["lr"].name], h[named["eps"].name], h[named["weight_decay"].name]
        coefficient, growth = h[named["d_coef"].name], h[named["growth_rate"].name]
        kind = h[b2.name].dtype
        beta2 = _meant(h[b2.name])
        beta1 = _meant(h[b1.name]) if keeps else torch.zeros_like(beta2)
        beta3 = beta2.sqrt() if options.beta3 is None else torch.full_like(beta2, options.beta3)
        on = lr > 0
        grads = updates if options.decouple else {k: g + decay * params[k] for k, g in updates.items()}
        power1, power2 = state.beta1_power * beta1, state.beta2_power * beta2
        d = state.d
        dlr = d * lr
        if options.corrects:
            dlr = dlr * ((1 - power2).sqrt() / (1 - power1))
        rate = dlr.to(kind)

        seen, there = sampled(grads), sampled(params)
        weight = (d / options.d0 * (d if options.safeguard else dlr)).to(kind)
        old1, old2, old3 = beta1.to(kind), beta2.to(kind), beta3.to(kind)
        fresh1, fresh2 = (d * (1 - beta1)).to(kind), (d * d * (1 - beta2)).to(kind)
        s = {k: _kept(on, old3 * state.s[k] + weight * g, state.s[k]) for k, g in seen.items()}
        zero = torch.zeros((), dtype=kind)
        dot = total([g * (state.start[k] - there[k]) for k, g in seen.items()], zero)
        numerator = beta3 * state.numerator + d / options.d0 * dlr * dot
        size = total([t.abs() for t in s.values()], zero)
        active = on & (size > 0)

        estimate = coefficient * numerator / torch.where(size > 0, size, torch.ones_like(size))
        first = torch.where(d == options.d0, torch.maximum(d, estimate), d)
        highest = torch.maximum(state.d_max, estimate)
        now = torch.minimum(highest, first * growth).clamp(max=options.limit)
        now = torch.where(active, now, d)
        floor, factor = (now * eps).to(kind), rate if keeps else (dlr * now).to(kind)

        mu = {k: _kept(on, old1 * state.mu[k] + fresh1 * g, state.mu[k]) for k, g in grads.items() if keeps}
        nu: Tensors = {}
        row: Tensors = {}
        column: Tensors = {}
        moves: Tensors = {}
        for k, g in grads.items():
            if factors(g):
                square = g * g + FACTORED_EPS
                row[k] = _kept(on, lerp_of(state.row[k], square.mean(-1, keepdim=True), old2), state.row[k])
                column[k] = _kept(on, lerp_of(state.column[k], square.mean(-2, keepdim=True), old2), state.column[k])
                # Its past has no d in it, so today's stands for all; the floor d eps is eps under it.
                root = (1 / inverse_root(row[k], column[k])).clamp(min=eps)
                move = factor * (mu[k] if keeps else g) / (d.to(kind) * root)
            else:
                nu[k] = _kept(on, old2 * state.nu[k] + fresh2 * g * g, state.nu[k])
                root = nu[k].sqrt()
                root = torch.maximum(root, (d * eps).to(kind)) if options.bounds_root else root + floor
                move = factor * (mu[k] if keeps else g) / root
            if options.decouple:
                # In the order of the source. Early steps are so small beside the weights that the rounding of each
                # addition shows in d; a difference of two near numbers is exact.
                p = params[k]
                move = p - ((p - decay * rate * p) - move)
            moves[k] = torch.where(active, -move, torch.zeros_like(move))
        state = ProdigyState(
            mu,
            nu,
            row,
            column,
            {k: 1 * t for k, t in state.start.items()},
            s,
            now,
            torch.where(active, highest, state.d_max),
            torch.where(active, numerator, state.numerator),
            torch.where(active, power1, state.beta1_power),
            torch.where(active, power2, state.beta2_power),
            rate,
        )
        return moves, state

    def diagnostics(state: ProdigyState) -> Mapping[str, Tensor]:
        return {"comp/prodigy_d": state.d, "comp/prodigy_lr": state.rate}

    def bind(infos: BankInfos) -> Transform:
        return _prodigy(given, betas, options, infos)

    numbers = by_name(named["lr"], *([b1] if keeps else []), b2, *list(named.values())[1:])
    extras = Extras("prodigy", numbers, diagnostics=diagnostics, bind=bind, descends=True, second_moments=("nu",))
    if options.factored:
        extras = extras._replace(roles=(MATRIX, ELEMENTWISE), second_moments=("nu", "row", "column"))
    return Transform(init, update, extras._replace(pools="d, which sums over all gradients estimate,"))


def lerp_of(mean: Tensor, sample: Tensor, beta: Tensor) -> Tensor:
    """One step of a running mean."""
    return mean + (1 - beta) * (sample - mean)


def _meant(beta: Tensor) -> Tensor:
    """The decimal number of at most seven places that a β in fp32 stands for, in fp64: 1 - β is off by 1e-5 otherwise,
    and d with it."""
    return (beta.to(torch.float64) * 1e7).round() / 1e7


def _kept(on: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(on, new, old)


class _Sample:
    """Every so manyth entry of each parameter of a bank, counted from its own first one."""

    def __init__(self, places: tuple[Place, ...], stride: int) -> None:
        self._places, self._stride = sorted(places, key=lambda place: place.at), stride
        self._tables: dict[str, Tensor] = {}

    def prepare(self, bank: Tensor) -> None:
        """Build the table of a flat bank ahead of the program that will read it, once: a CUDA graph reads it in
        place instead of copying it before every replay."""
        if bank.ndim == 1 and type(bank) is Tensor and str(bank.device) not in self._tables:
            table = self._tables[str(bank.device)] = self._table(bank)
            mark_static(table)

    def of(self, bank: Tensor) -> Tensor:
        """``[K, q]`` of a stacked bank, ``[q]`` of a flat one."""
        if bank.ndim > 1:
            return bank.flatten(1)[:, :: self._stride]
        table = self._tables.get(str(bank.device))
        return bank[self._table(bank) if table is None else table]

    def _table(self, bank: Tensor) -> Tensor:
        ranges = [(place.at, place.at + place.numel) for place in self._places] or [(0, bank.shape[0])]
        return torch.cat([torch.arange(a, b, self._stride, device=bank.device) for a, b in ranges])
