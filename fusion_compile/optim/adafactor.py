"""Adafactor with relative steps, as ``torch.optim.Adafactor`` (Shazeer & Stern, 1804.04235)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import chain
from fusion_compile.optim._parameter_sums import ParameterSums, prepare_flat, sums_by_bank, sums_for
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    MATRIX,
    BankInfos,
    Context,
    Extras,
    Number,
    Transform,
    by_name,
    declare,
)
from fusion_compile.optim._tree import count_like
from fusion_compile.optim.clip_update_rms import clip_update_rms


class ScaleByAdafactorState(NamedTuple):
    """`row`, `column`, `nu`: the second moment, as in `scale_by_factored_rms`. `taken`: updates taken, 0-dim."""

    row: Tensors
    column: Tensors
    nu: Tensors
    taken: Tensor


class StepByParameterRmsState(NamedTuple):
    """`taken`: updates taken, 0-dim."""

    taken: Tensor


def scale_by_adafactor(beta2_decay: float = -0.8, *, eps: float | None = None) -> Transform:
    """`scale_by_factored_rms` whose β₂ grows, ``1 - t^beta2_decay``, and which therefore needs no bias correction.

    4 (m + n) bytes a matrix, 4 an entry of the rest.
    Source: 1804.04235, ``torch.optim.Adafactor``. Deviations: a convolution is the matrix of its first axis and all
    others; torch factors its last two.

    Args:
        beta2_decay: Exponent, below 0.
        eps: Lower bound on the root of the second moment; None is fp32's 1.2e-7 (fp64's where the state is fp64).

    Returns:
        A transform without a step, for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        ValueError: `beta2_decay` is not below 0.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.scale_by_adafactor(), optim.clip_update_rms()).roles
        ('matrix', 'scalar')
    """
    if not beta2_decay < 0:
        raise ValueError(f"beta2_decay={beta2_decay!r} must lie below 0, so that β₂ = 1 - t^beta2_decay grows to 1.")

    def init(params: Tensors) -> ScaleByAdafactorState:
        matrices = {k: p for k, p in params.items() if p.ndim > 1}
        return ScaleByAdafactorState(
            {k: p.new_zeros((*p.shape[:-1], 1)) for k, p in matrices.items()},
            {k: p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) for k, p in matrices.items()},
            {k: p.new_zeros(p.shape) for k, p in params.items() if p.ndim <= 1},
            count_like(params),
        )

    def update(
        updates: Tensors, state: ScaleByAdafactorState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByAdafactorState]:
        count = state.taken + 1
        scaled: Tensors = {}
        row: Tensors = {}
        column: Tensors = {}
        nu: Tensors = {}
        for k, g in updates.items():
            least = torch.finfo(g.dtype).eps if eps is None else eps
            fresh = count.to(g.dtype) ** beta2_decay
            square = g * g
            if g.ndim > 1:
                row[k] = state.row[k] + fresh * (square.mean(-1, keepdim=True) - state.row[k])
                column[k] = state.column[k] + fresh * (square.mean(-2, keepdim=True) - state.column[k])
                v = row[k] * column[k] / row[k].mean(-2, keepdim=True).clamp(min=least)
            else:
                v = nu[k] = state.nu[k] + fresh * (square - state.nu[k])
            scaled[k] = g * v.clamp(min=least * least).rsqrt()
        return scaled, ScaleByAdafactorState(row, column, nu, count)

    extras = Extras("scale_by_adafactor", {}, (MATRIX, ELEMENTWISE), second_moments=("row", "column", "nu"))
    return Transform(init, update, extras)


def step_by_parameter_rms(lr: Number = 1e-2, weight_decay: Number = 0.0, *, minimum: float = 1e-3) -> Transform:
    """``-min(lr, 1/√t) max(minimum, rms(p)) u - lr weight_decay p``: steps relative to each parameter's size.

    Any shape: every matrix of ``[..., m, n]`` is one parameter; a flat bank is split once the transform is bound.
    Keeps a count. Source: 1804.04235, ``torch.optim.Adafactor``. Deviations: none.

    Args:
        lr: Share of its root mean square by which a parameter moves, at most. Live.
        weight_decay: Per unit of lr. Live.
        minimum: Least root mean square that counts, so that parameters at zero move.

    Returns:
        A transform that takes a step.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.scale_by_adafactor(), optim.step_by_parameter_rms(0.01)).descends
        True
    """
    declare("lr", lr)
    return _relative(lr, weight_decay, minimum, {})


def _relative(lr: Number, weight_decay: Number, minimum: float, flat: Mapping[str, ParameterSums]) -> Transform:
    rate, decay = declare("lr", lr), declare("weight_decay", weight_decay)

    def init(params: Tensors) -> StepByParameterRmsState:
        prepare_flat(flat, params)
        return StepByParameterRmsState(count_like(params))

    def update(
        updates: Tensors, state: StepByParameterRmsState, params: Tensors, context: Context
    ) -> tuple[Tensors, StepByParameterRmsState]:
        step, shrink = context.hyperparameters[rate.name], context.hyperparameters[decay.name]
        count = state.taken + 1
        bounded = torch.minimum(step, count.to(step.dtype).rsqrt())
        moves: Tensors = {}
        for k, u in updates.items():
            p = params[k]
            parameters = sums_for(flat, k, p)
            size = (parameters.sums(p * p) / parameters.entries(p).clamp(min=1)).sqrt().clamp(min=minimum)
            moves[k] = -bounded * parameters.scale(u, size) - step * shrink * p
        return moves, StepByParameterRmsState(count)

    def bind(infos: BankInfos) -> Transform:
        return _relative(lr, weight_decay, minimum, sums_by_bank(infos))

    extras = Extras("step_by_parameter_rms", by_name(rate, decay), bind=bind, descends=True)
    return Transform(init, update, extras)


def adafactor(
    lr: Number = 1e-2,
    weight_decay: Number = 0.0,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    clip_threshold: float = 1.0,
) -> Transform:
    """Adafactor without momentum. 4 (m + n) bytes a matrix, 4 an entry of the rest.

    Source: 1804.04235, ``torch.optim.Adafactor``. Deviations: a convolution is the matrix of its first axis and all
    others.

    Args:
        lr: Share of its root mean square by which a parameter moves, at most; from step 1/lr² on it falls as 1/√t.
        weight_decay: Per unit of lr.
        beta2_decay: Exponent of β₂ = 1 - t^beta2_decay.
        eps: Lower bounds on the root of the second moment and on a parameter's root mean square.
        clip_threshold: Bound on the root mean square of each direction.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adafactor(0.01).name
        'adafactor'
    """
    direction = chain(scale_by_adafactor(beta2_decay, eps=eps[0]), clip_update_rms(clip_threshold))
    return chain(direction, step_by_parameter_rms(lr, weight_decay, minimum=eps[1]), name="adafactor")
