"""Cautious updates: no step against the gradient (Liang et al., 2411.16085)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import wrapped
from fusion_compile.optim._member_sums import MemberSums
from fusion_compile.optim._transform import Context, Facts, State, Transform, bound, ones_like_scalar

RESCALES = ("mean", "norm", "count_plus_one", "none")
NORM_EPS = 1e-8


class CautiousState(NamedTuple):
    """`base`: the wrapped transform's state; `keep_frac`: what share of all entries the last mask kept, 0-dim."""

    base: State
    keep_frac: Tensor


def cautious(base: Transform, *, floor: float = 1e-3, rescale: str = "mean") -> Transform:
    """``mask · u · factor`` with ``u = base(g)`` and ``mask = 1[u g > 0]``: entries that disagree with the gradient
    stand still, one factor for each parameter makes up for them.

    `base` gives a direction, to be subtracted: decay and `scale_by_learning_rate` come after `cautious`. `rescale`, n
    entries of which k agree:

    - ``"mean"``: ``1 / max(k / n, floor)``, as the official C-AdamW and C-Muon. No entry grows by more than
      ``1 / floor``, however few agree;
    - ``"norm"``: ``‖u‖ / (‖mask · u‖ + 1e-8)``, FusionOpt's: the step keeps its norm. Use it behind `orthogonalize`,
      where about half the signs disagree and ``"mean"`` adds 40 % to the norm;
    - ``"count_plus_one"``: ``n / (k + 1)``, the paper's and the official C-Lion's; bounded by n / 2 only;
    - ``"none"``: 1.

    Any shape: every matrix of ``[..., m, n]`` is one parameter; a flat bank is split into its parameters once the
    transform is bound, as `compile_training_step` does, and is one parameter before. Diagnostic:
    ``comp/cautious_keep_frac``. No memory but index tables for flat banks, at most 1 byte a parameter plus 16 for every
    1,024.
    Source: the paper; ``c_adamw.py``, ``c_muon.py``, ``c_lion.py`` of C-Optim. Deviations: signs are compared, as the
    product of two small numbers rounds to zero; C-Muon masks the momentum before Newton-Schulz, which here is
    ``chain(cautious(momentum), …)``.
    """
    if rescale not in RESCALES:
        raise ValueError(f"rescale={rescale!r} is not known; use one of {', '.join(map(repr, RESCALES))}.")
    if not 0 < floor <= 1:
        raise ValueError(f"floor={floor} must lie in (0, 1]: it bounds the factor by 1 / floor.")
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} moves the gradient point; wrap cautious() in it, not it in cautious().")
    return _cautious(base, floor, rescale, {})


def _cautious(base: Transform, floor: float, rescale: str, flat: Mapping[str, MemberSums]) -> Transform:
    def init(params: Tensors) -> CautiousState:
        for k, p in params.items():
            if k in flat and p.ndim == 1:
                flat[k].prepare(p)
        return CautiousState(base.init(params), torch.zeros_like(ones_like_scalar(params)))

    def update(
        updates: Tensors, state: CautiousState, params: Tensors, context: Context
    ) -> tuple[Tensors, CautiousState]:
        directions, base_state = base.update(updates, state.base, params, context)
        masked: Tensors = {}
        kept, entries = torch.zeros_like(state.keep_frac), torch.zeros_like(state.keep_frac)
        for k, u in directions.items():
            parameters = flat[k] if k in flat and u.ndim == 1 else _Whole()
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
            kept, entries = kept + agreeing.sum(), entries + n.expand_as(agreeing).sum()
        return masked, CautiousState(base_state, kept / entries.clamp(min=1))

    passed = wrapped(base)
    tells = passed.pop("diagnostics", None)

    def diagnostics(state: CautiousState) -> Mapping[str, Tensor]:
        return {**({} if tells is None else tells(state)), "comp/cautious_keep_frac": state.keep_frac}

    def bind(facts: Facts) -> Transform:
        members = {k: MemberSums(bank.members) for k, bank in facts.items() if bank.members}
        return _cautious(bound(base, facts), floor, rescale, members)

    return Transform(
        init,
        update,
        base.hyperparameters,
        base.roles,
        name=f"cautious({base.name})",
        diagnostics=diagnostics,
        **passed,
        bind=bind,
    )


class _Whole:
    """What `MemberSums` does, where every matrix (or the whole vector) is one parameter."""

    def sums(self, t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True).sum(-2, keepdim=True) if t.ndim > 1 else t.sum()

    def entries(self, t: Tensor) -> Tensor:
        n = t.shape[-1] * t.shape[-2] if t.ndim > 1 else t.numel()
        return torch.full((), n, dtype=t.dtype, device=t.device)

    def scale(self, t: Tensor, factors: Tensor) -> Tensor:
        return t * factors
