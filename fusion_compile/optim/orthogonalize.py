"""Muon's direction: momentum, then its nearest semi-orthogonal matrix (Jordan et al. 2024; ``torch.optim.Muon``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._compat import fast_product_dtype
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    SPECTRAL,
    BankInfos,
    Context,
    EmptyState,
    Extras,
    Number,
    Periodic,
    Transform,
    by_name,
    declare,
)
from fusion_compile.optim._tree import copy, lerp, number_like, update_mean, zeros_like
from fusion_compile.optim.matrix.blocks import in_blocks
from fusion_compile.optim.matrix.coefficients import POLYNOMIALS
from fusion_compile.optim.matrix.newton_schulz import orthogonalize as _orthogonalize
from fusion_compile.optim.matrix.newton_schulz import resolve_gram_restarts

MATMUL_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO = "auto"
_PRODUCTS = (*MATMUL_DTYPES.values(), torch.float64)


class AuditState(NamedTuple):
    """Result of the last audit, 0-dim, zeros before the first. `input`: the last input, if no momentum is kept."""

    rel_mean: Tensor
    rel_max: Tensor
    abs_max: Tensor
    input: Tensors


class OrthogonalizeState(NamedTuple):
    """`mu`: momentum, ``[..., m, n]``, in the parameters' dtype; empty without one. `audit`: empty without audits."""

    mu: Tensors
    audit: AuditState | EmptyState = EmptyState()


def orthogonalize(
    momentum: Number | None = 0.95,
    *,
    nesterov: bool = True,
    coefficients: str = "jordan",
    matmul_dtype: torch.dtype | str = AUTO,
    gram_restarts: tuple[int, ...] | str | None = None,
    guard: bool | None = None,
    audit_every: int = 0,
    iterations: int | None = None,
) -> Transform:
    """``NS(lerp(g, mu, momentum))`` after ``mu ← lerp(mu, g, 1 - momentum)``, NS five Newton-Schulz iterations.

    Without Nesterov ``NS(mu)``; with `momentum` None ``NS(g)``, for a chain that has a momentum already. The result has
    singular values near 1. In a bank with blocks (CMuon: q, k and v of one weight) every block is orthogonalized by
    itself. Matrices ``[..., m, n]``. 4 bytes a parameter; without a momentum none, but 4 with audits, which then keep
    the last input.
    Source: Jordan et al. 2024; ``torch.optim.Muon`` (exponential-average momentum; norm clamped at 1e-7). Deviations:
    none, apart from the dtype of products on a device that does not multiply bf16 fast.

    Args:
        momentum: Decay of the average, live under that name; None keeps no momentum.
        nesterov: Look ahead from the new average.
        coefficients: ``"jordan"``, ``"quintic"`` or ``"polar_express"``.
        matmul_dtype: Dtype of the matrix products: ``torch.bfloat16``, ``float16`` or ``float32``, or ``"bf16"``,
            ``"fp16"``, ``"fp32"``. ``"auto"``: bf16 where the device has instructions for it, else what it multiplies
            fast: fp16 on GPUs of compute capability 7, fp32 on CPUs without bf16. `explain` says which.
        gram_restarts: If one side is at least twice the other, run the iterations in the Gram matrix and restart from
            the matrix at these iterations. It is the same polynomial with a fifth ((2, 4), sides 1:4) to a third (one
            restart) fewer operations, but in bf16 not bit by bit what ``torch.optim.Muon`` computes. ``"auto"``: the
            cheapest restarts that cannot diverge (in bf16 (2,), an error of 3 % against the exact polynomial on random
            matrices; plain iterations and (2, 4) have 1 %: see ``matrix.newton_schulz``). Other restarts may diverge:
            (3,) in bf16 does for a momentum with two dominant directions. None: plain iterations.
        guard: Bound the update: its norm never exceeds that of an orthogonalized matrix, and what is not finite becomes
            zero. None: only if the Gram matrix is used.
        audit_every: After the first step, and every `audit_every` steps from there, a second program compares this
            computation on the momentum (without Nesterov's look-ahead) with plain iterations in fp32 (fp64 if the state
            is fp64). Metrics of the last audit: ``fusion/audit_rel_mean`` and ``fusion/audit_rel_max``, mean and
            largest over all matrices of ``‖O - O_fp32‖_F / ‖O_fp32‖_F``, and ``fusion/audit_abs_max``, the largest
            error of an entry. (FusionOpt's names end in ``_avg`` and ``_p99``; these are one audit's.) On a GPU that
            may use TF32, fp32 is TF32. 0: no audits.
        iterations: Only the first so many of the five; the result is then less orthogonal. None: all.

    Returns:
        A transform without a step, for the role ``"spectral"``. The unit of a following lr is spectral norm per step.

    Raises:
        ValueError: `coefficients`, `matmul_dtype`, `gram_restarts`, `audit_every` or `iterations` is none of
            the above.

    Example:
        >>> from fusion_compile import optim
        >>> muon = optim.chain(optim.orthogonalize(0.95), optim.scale_by_shape(), optim.scale_by_learning_rate(0.02))
        >>> optimizer = optim.partition({"spectral": muon, "scalar": optim.adamw(optim.Named("scalar_lr", 3e-4))})
        >>> optimizer.descends
        True
    """
    if coefficients not in POLYNOMIALS:
        raise ValueError(f"coefficients={coefficients!r} is not known; use one of {', '.join(map(repr, POLYNOMIALS))}.")
    chosen = MATMUL_DTYPES.get(matmul_dtype, matmul_dtype) if isinstance(matmul_dtype, str) else matmul_dtype
    if chosen != AUTO and (not isinstance(chosen, torch.dtype) or chosen not in _PRODUCTS):
        raise ValueError(
            f"matmul_dtype={matmul_dtype!r} cannot run Newton-Schulz; use torch.bfloat16, float16 or float32, or one "
            f"of {', '.join(map(repr, (AUTO, *MATMUL_DTYPES)))}."
        )
    if type(audit_every) is not int or audit_every < 0:
        raise ValueError(f"audit_every={audit_every!r} is not a number of steps; give a whole number, or 0 for never.")
    if iterations is not None and (type(iterations) is not int or iterations < 1 or gram_restarts is not None):
        raise ValueError(
            f"iterations={iterations!r} with gram_restarts={gram_restarts!r}: give a whole number of at least 1, and "
            f"no restarts, which are places among all five."
        )
    restarts = {dtype: resolve_gram_restarts(gram_restarts, coefficients, dtype) for dtype in _PRODUCTS}

    def products(device_type: str) -> torch.dtype:
        return chosen if isinstance(chosen, torch.dtype) else fast_product_dtype(device_type)

    beta = None if momentum is None else declare("momentum", momentum)

    def built(infos: BankInfos) -> Transform:
        blocks = {key: info.blocks for key, info in infos.items()}

        def polar(key: str, m: Tensor) -> Tensor:
            dtype = products(m.device.type)
            return in_blocks(
                lambda b: (_orthogonalize(b, coefficients, dtype, restarts[dtype], guard, iterations),),
                blocks.get(key),
                m,
            )[0]

        def exact(key: str, m: Tensor) -> Tensor:
            wide = torch.promote_types(m.dtype, torch.float32)
            return in_blocks(
                lambda b: (_orthogonalize(b, coefficients, wide, iterations=iterations),), blocks.get(key), m
            )[0]

        def init(params: Tensors) -> OrthogonalizeState:
            mu = {} if beta is None else zeros_like(params)
            if not audit_every:
                return OrthogonalizeState(mu)
            inputs = zeros_like(params) if beta is None else {}
            zero = number_like(params, 0.0)
            return OrthogonalizeState(mu, AuditState(zero, zero.clone(), zero.clone(), inputs))

        def update(
            updates: Tensors, state: OrthogonalizeState, params: Tensors, context: Context
        ) -> tuple[Tensors, OrthogonalizeState]:
            if beta is None:
                if isinstance(state.audit, AuditState):
                    state = state._replace(audit=state.audit._replace(input=copy(updates)))
                return {k: polar(k, g) for k, g in updates.items()}, state
            beta_now = context.hyperparameters[beta.name]
            mu = update_mean(state.mu, updates, beta_now)
            ahead = lerp(updates, mu, beta_now) if nesterov else mu
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

        def diagnostics(state: OrthogonalizeState) -> Mapping[str, Tensor]:
            assert isinstance(state.audit, AuditState)
            return {
                f"fusion/audit_{field}": getattr(state.audit, field) for field in ("rel_mean", "rel_max", "abs_max")
            }

        def note(device_type: str) -> str:
            name = str(products(device_type)).removeprefix("torch.")
            return (
                f"Newton-Schulz multiplies in {name}, which this {device_type} has instructions for "
                f"(matmul_dtype='auto'; give a dtype to choose another)."
            )

        extras = Extras(
            "orthogonalize",
            {} if beta is None else by_name(beta),
            (SPECTRAL,),
            diagnostics=diagnostics if audit_every else None,
            periodic=(Periodic("audit", audit_every, audit),) if audit_every else (),
            bind=built,
            notes=(note,) if chosen == AUTO else (),
        )
        return Transform(init, update, extras)

    return built({})


def _norms(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix of ``[..., m, n]``."""
    return (x * x).sum(-1).sum(-1).sqrt()
