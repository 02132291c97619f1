"""Cautious updates: no entry steps against the gradient (Liang et al., 2411.16085)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._parameter_sums import ParameterSums, prepare_flat, sums_by_bank, sums_for
from fusion_compile.optim._total import total_of_rows
from fusion_compile.optim._transform import BankInfos, Context, State, Transform, bound, check_transform
from fusion_compile.optim._tree import number_like

RESCALES = ("mean", "norm", "count_plus_one", "none")
NORM_EPS = 1e-8


class CautiousState(NamedTuple):
    """`base`: the wrapped transform's state; `keep_frac`: share of all entries that the last mask kept, 0-dim."""

    base: State
    keep_frac: Tensor


def cautious(base: Transform, *, floor: float = 1e-3, rescale: str = "mean") -> Transform:
    """``mask · u · factor`` with ``u = base(g)`` and ``mask = 1[u g > 0]``.

    Entries that disagree with the gradient stand still; one factor for each parameter compensates for them. Any shape:
    every matrix of ``[..., m, n]`` is one parameter; a flat bank is split into its parameters once the transform is
    bound, which `compile_training_step` does, and is one parameter before. No memory except index tables for flat
    banks, at most 1 byte a parameter plus 16 for every 1,024. Diagnostic: ``comp/cautious_keep_frac``.
    Source: the paper; ``c_adamw.py``, ``c_muon.py``, ``c_lion.py`` of C-Optim. Deviations: signs are compared, because
    the product of two small numbers rounds to zero; C-Muon masks the momentum before Newton-Schulz, which here is
    ``chain(cautious(scale_by_momentum()), …)``.

    Args:
        base: Gives the direction u, which is subtracted later: decay and `scale_by_learning_rate` come after
            `cautious`.
        floor: For ``"mean"``: no entry grows by more than ``1 / floor``, however few agree. In (0, 1].
        rescale: The factor for a parameter of n entries of which k agree.
            ``"mean"``: ``1 / max(k / n, floor)``, as the official C-AdamW and C-Muon.
            ``"norm"``: ``‖u‖ / (‖mask · u‖ + 1e-8)``, FusionOpt's: the step keeps its norm. Use it after
            `orthogonalize`, where about half the signs disagree and ``"mean"`` adds 40 % to the norm.
            ``"count_plus_one"``: ``n / (k + 1)``, the paper's and the official C-Lion's; bounded by n / 2 only.
            ``"none"``: 1.

    Returns:
        A transform without a step, with the roles and numbers of `base`.

    Raises:
        ValueError: `rescale` or `floor` is not one of the above; `base` moves the gradient point, or takes the step
            (then every entry would disagree, and nothing would move).

    Example:
        >>> from fusion_compile import optim
        >>> c_adamw = optim.chain(
        ...     optim.cautious(optim.scale_by_adam()),
        ...     optim.add_decayed_weights(0.01),
        ...     optim.scale_by_learning_rate(1e-3),
        ... )
        >>> c_adamw.descends
        True
    """
    if rescale not in RESCALES:
        raise ValueError(f"rescale={rescale!r} is not known; use one of {', '.join(map(repr, RESCALES))}.")
    if not 0 < floor <= 1:
        raise ValueError(f"floor={floor} must lie in (0, 1]: it bounds the factor by 1 / floor.")
    check_transform("cautious(), base,", base)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} moves the gradient point; wrap cautious() in it, not it in cautious().")
    if base.descends:
        raise ValueError(
            f"{base.name} takes a step, which is against every gradient, so cautious() would hold all entries still; "
            f"wrap the direction, and put the learning rate after it: "
            f"chain(cautious(scale_by_adam()), scale_by_learning_rate(1e-3))."
        )
    return _cautious(base, floor, rescale, {})


def _cautious(base: Transform, floor: float, rescale: str, flat: Mapping[str, ParameterSums]) -> Transform:
    def init(params: Tensors) -> CautiousState:
        prepare_flat(flat, params)
        return CautiousState(base.init(params), number_like(params, 0.0))

    def update(
        updates: Tensors, state: CautiousState, params: Tensors, context: Context
    ) -> tuple[Tensors, CautiousState]:
        directions, base_state = base.update(updates, state.base, params, context)
        masked: Tensors = {}
        kept: list[Tensor] = []
        count = 0
        for k, u in directions.items():
            parameters = sums_for(flat, k, u)
            mask = (u.sign() * updates[k].sign() > 0).to(u.dtype)
            agreeing, n = parameters.sums(mask), parameters.entries(u)
            masked[k] = u * mask
            if rescale == "mean":
                factor = 1 / (agreeing / n).clamp(min=floor)
            elif rescale == "count_plus_one":
                factor = n / (agreeing + 1)
            elif rescale == "norm":
                norm, left = parameters.sums(u * u).sqrt(), parameters.sums(u * masked[k]).sqrt()
                factor = norm / (left + NORM_EPS)
            if rescale != "none":
                masked[k] = parameters.scale(masked[k], factor)
            kept.append(agreeing.reshape(-1))
            count += parameters.count(u)
        keep_frac = total_of_rows(kept, torch.zeros_like(state.keep_frac)) / max(count, 1)
        return masked, CautiousState(base_state, keep_frac)

    def bind(infos: BankInfos) -> Transform:
        return _cautious(bound(base, infos), floor, rescale, sums_by_bank(infos))

    def diagnostics(state: CautiousState) -> Mapping[str, Tensor]:
        return {"comp/cautious_keep_frac": state.keep_frac}

    extras = wrap(base, f"cautious({base.name})", {}, diagnostics=diagnostics)
    return Transform(init, update, extras._replace(bind=bind))
