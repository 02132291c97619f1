"""Muon's direction: momentum, then its nearest semi-orthogonal matrix (Jordan et al. 2024; ``torch.optim.Muon``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    SPECTRAL,
    Context,
    EmptyState,
    Facts,
    Periodic,
    Scalar,
    Transform,
    declare,
    ones_like_scalar,
)
from fusion_compile.optim.matrix.blocks import in_blocks
from fusion_compile.optim.matrix.coefficients import TABLES
from fusion_compile.optim.matrix.newton_schulz import orthogonalize as _orthogonalize
from fusion_compile.optim.matrix.newton_schulz import resolve_gram_restarts

HOT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class AuditState(NamedTuple):
    """What the last audit found, 0-dim, zeros before the first. `input`: the last input, where no momentum is kept."""

    rel_mean: Tensor
    rel_max: Tensor
    abs_max: Tensor
    input: Tensors


class OrthogonalizeState(NamedTuple):
    """`mu`: momentum, ``[..., m, n]``, in the parameters' dtype; empty without one. `audit`: empty without audits."""

    mu: Tensors
    audit: AuditState | EmptyState = EmptyState()


def orthogonalize(
    momentum: Scalar | None = 0.95,
    *,
    nesterov: bool = True,
    table: str = "jordan",
    hot_dtype: torch.dtype | str = torch.bfloat16,
    gram_restarts: tuple[int, ...] | str | None = None,
    guard: bool | None = None,
    audit_every: int = 0,
) -> Transform:
    """``NS(lerp(g, mu, momentum))`` after ``mu ← lerp(mu, g, 1 - momentum)``; without Nesterov ``NS(mu)``; with
    `momentum` None ``NS(g)``, for a chain that has a momentum already.

    The result has singular values near 1: one unit is one unit of spectral norm. `table`: ``"jordan"``, ``"quintic"``
    or ``"polar_express"``; `hot_dtype`: dtype of the matrix products, ``torch.bfloat16``, ``float16`` or ``float32``,
    or ``"bf16"``, ``"fp16"``, ``"fp32"``. Of a bank with blocks (CMuon: q, k and v of one weight) every block is
    orthogonalized by itself.

    `gram_restarts`: run the iterations in the Gram matrix where one side is at least twice the other: the same
    polynomial with a fifth ((2, 4), sides 1:4) to a third (one restart) fewer operations, but in bf16 not bit by bit
    what ``torch.optim.Muon`` computes. ``"auto"``: the cheapest restarts that cannot diverge (in bf16 (2,), an error of
    3 % against the exact polynomial on random matrices where plain iterations and (2, 4) have 1 %: see
    ``matrix.newton_schulz``). Other ones are yours to answer for: with (3,) in bf16 a momentum with two directions that
    dominate can diverge. `guard`, by default where the Gram matrix is used, then bounds the update: its norm never
    exceeds that of an orthogonalized matrix, and what is not finite is zero.

    `audit_every`: after the first step, and every so many from there, a second program compares this computation on the
    momentum (without Nesterov's look-ahead) with plain iterations in fp32 (fp64 where the state is fp64). Metrics of
    the last audit: ``fusion/audit_rel_mean`` and ``fusion/audit_rel_max``, mean and largest over all matrices of
    ``‖O - O_fp32‖_F / ‖O_fp32‖_F``, and ``fusion/audit_abs_max``, the largest error of an entry. (FusionOpt's names end
    in ``_avg`` and ``_p99``; these are one audit's.) On a GPU that may use TF32, fp32 is TF32.

    Memory: 4 bytes a parameter; without a momentum none, but 4 for audits, which then keep the last input.
    Deviations: none from ``torch.optim.Muon`` (exponential-average momentum; norm clamped at 1e-7).
    """
    if table not in TABLES:
        raise ValueError(f"table={table!r} is not known; use one of {', '.join(map(repr, TABLES))}.")
    hot_dtype = HOT_DTYPES.get(hot_dtype, hot_dtype) if isinstance(hot_dtype, str) else hot_dtype
    if not isinstance(hot_dtype, torch.dtype) or hot_dtype not in (*HOT_DTYPES.values(), torch.float64):
        raise ValueError(
            f"hot_dtype={hot_dtype!r} cannot run Newton-Schulz; use torch.bfloat16, float16 or float32, or one of "
            f"{', '.join(map(repr, HOT_DTYPES))}."
        )
    if type(audit_every) is not int or audit_every < 0:
        raise ValueError(f"audit_every={audit_every!r} is not a number of steps; give a whole number, or 0 for never.")
    restarts = resolve_gram_restarts(gram_restarts, table, hot_dtype)
    beta = None if momentum is None else declare("momentum", momentum)

    def built(facts: Facts) -> Transform:
        blocks = {key: bank.blocks for key, bank in facts.items()}

        def polar(key: str, m: Tensor) -> Tensor:
            return in_blocks(lambda b: (_orthogonalize(b, table, hot_dtype, restarts, guard),), blocks.get(key), m)[0]

        def exact(key: str, m: Tensor) -> Tensor:
            wide = torch.promote_types(m.dtype, torch.float32)
            return in_blocks(lambda b: (_orthogonalize(b, table, wide),), blocks.get(key), m)[0]

        def init(params: Tensors) -> OrthogonalizeState:
            mu = {} if beta is None else {k: torch.zeros_like(p) for k, p in params.items()}
            if not audit_every:
                return OrthogonalizeState(mu)
            inputs = {k: torch.zeros_like(p) for k, p in params.items()} if beta is None else {}
            zero = torch.zeros_like(ones_like_scalar(params))
            return OrthogonalizeState(mu, AuditState(zero, zero.clone(), zero.clone(), inputs))

        def update(
            updates: Tensors, state: OrthogonalizeState, params: Tensors, context: Context
        ) -> tuple[Tensors, OrthogonalizeState]:
            if beta is None:
                if isinstance(state.audit, AuditState):
                    inputs = {k: g.clone() for k, g in updates.items()}
                    state = state._replace(audit=state.audit._replace(input=inputs))
                return {k: polar(k, g) for k, g in updates.items()}, state
            beta_now = context.hyperparameters[beta.name]
            mu = {k: state.mu[k] + (1 - beta_now) * (g - state.mu[k]) for k, g in updates.items()}
            ahead = {k: g + beta_now * (mu[k] - g) for k, g in updates.items()} if nesterov else mu
            return {k: polar(k, m) for k, m in ahead.items()}, state._replace(mu=mu)

        def audit(state: OrthogonalizeState, params: Tensors, context: Context) -> OrthogonalizeState:
            assert isinstance(state.audit, AuditState)
            relative, absolute = [], []
            for k, m in (state.audit.input if beta is None else state.mu).items():
                wanted = exact(k, m)
                error = polar(k, m) - wanted
                # A momentum of zeros is orthogonalized to zeros by both: no error.
                relative.append((_norms(error) / _norms(wanted).clamp(min=torch.finfo(m.dtype).tiny)).flatten())
                absolute.append(error.abs().amax())
            rel, largest = torch.cat(relative), torch.stack(absolute).amax()
            found = state.audit._replace(rel_mean=rel.mean(), rel_max=rel.amax(), abs_max=largest)
            return state._replace(audit=found)

        def told(state: OrthogonalizeState) -> Mapping[str, Tensor]:
            assert isinstance(state.audit, AuditState)
            return {
                f"fusion/audit_{field}": getattr(state.audit, field) for field in ("rel_mean", "rel_max", "abs_max")
            }

        return Transform(
            init,
            update,
            {} if beta is None else {beta.name: beta.value},
            roles=(SPECTRAL,),
            name="orthogonalize",
            diagnostics=told if audit_every else None,
            periodic=(Periodic("audit", audit_every, audit),) if audit_every else (),
            bind=built,
        )

    return built({})


def _norms(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix of ``[..., m, n]``."""
    return (x * x).sum(-1).sum(-1).sqrt()
