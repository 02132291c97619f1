"""Shampoo: an update between inverse fourth roots of its rows' and columns' covariances (Gupta et al., 1802.09568)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import wrapped
from fusion_compile.optim._transform import (
    SPECTRAL,
    Context,
    Facts,
    Periodic,
    Scalar,
    State,
    Transform,
    bound,
    declare,
    merge_hyperparameters,
    ones_like_scalar,
)
from fusion_compile.optim.clip import global_norm
from fusion_compile.optim.matrix.inverse_roots import all_finite, check_root, inverse_root
from fusion_compile.optim.momentum import momentum

GRAFTS = ("none", "norm")


class ShampooState(NamedTuple):
    """`base`: state of what maps gradient to update. Of matrices ``[..., m, n]``: `left` ``[..., m, m]`` and `right`
    ``[..., n, n]`` running covariances, `left_root` and `right_root` their inverse fourth roots. `gain`: 0-dim, norm of
    the preconditioned update over that of the incoming one, all matrices together."""

    base: State
    left: Tensors
    right: Tensors
    left_root: Tensors
    right_root: Tensors
    gain: Tensor


def shampoo(
    shampoo_beta: Scalar = 0.95,
    beta1: Scalar = 0.9,
    *,
    base: Transform | None = None,
    every: int = 10,
    ridge: float = 1e-4,
    graft: str = "none",
) -> Transform:
    """``L^(-1/4) U R^(-1/4)``; ``L ← β L + (1 - β) G Gᵀ``, ``R ← β R + (1 - β) Gᵀ G``, β = `shampoo_beta`.

    The roots are renewed after the first update and after every `every`-th, of ``L + ridge ‖L‖ I``, by a Newton
    iteration of matrix products (``matrix.inverse_roots``); update 1 is not preconditioned. The ridge is relative to
    the largest row sum: an absolute one turns the preconditioner into the identity where gradients are small. 1e-4 is
    the smallest with which TensorFloat32 products converge; true fp32 ones do with 1e-6. A root that did not converge
    stays what it was.

    U comes from `base`, a transform that is given the gradient (momentum, MONA, ...), while L and R are built from the
    gradient itself; None: ``U ← lerp(U, G, 1 - beta1)``. `graft`: ``"norm"`` gives the result the norm of U, matrix by
    matrix; ``"none"`` leaves its own, which only a brick that ignores it should follow (an orthogonalization): a
    gradient that grows is multiplied by roots that were made for small ones, and the weights diverge.

    Unit of lr: U's with ``"norm"``. Memory for one m×n matrix in fp32: 8 (m/n + n/m) bytes a parameter, and 4 for U
    when `base` is None (square: 20; 1:4: 38). Four products of matrices per update.
    Source: the paper, with the running averages and the relative ridge (there 1e-6) of Anil et al., 2002.09018.
    Deviations: averages instead of sums, without bias correction; the roots are at most `every` updates old.
    """
    if graft not in GRAFTS:
        raise ValueError(f"graft={graft!r} is not known; use one of {', '.join(map(repr, GRAFTS))}.")
    check_root(4, ridge)
    inner, b = base_or_mean("shampoo", base, beta1), declare("shampoo_beta", shampoo_beta)

    def init(params: Tensors) -> ShampooState:
        left, right = zero_factors(params, "shampoo")
        left_root, right_root = ({k: eye_like(s) for k, s in side.items()} for side in (left, right))
        gain = torch.zeros_like(ones_like_scalar(params))
        return ShampooState(inner.init(params), left, right, left_root, right_root, gain)

    def update(
        updates: Tensors, state: ShampooState, params: Tensors, context: Context
    ) -> tuple[Tensors, ShampooState]:
        beta = context.hyperparameters[b.name]
        incoming, base_state = inner.update(updates, state.base, params, context)
        directions = {k: state.left_root[k] @ u @ state.right_root[k] for k, u in incoming.items()}
        gain = gain_of(directions, incoming)
        if graft == "norm":
            directions = {k: d * (_norm(incoming[k]) / _above_zero(_norm(d))) for k, d in directions.items()}
        left, right = mean_factors(state.left, state.right, updates, beta)
        return directions, state._replace(base=base_state, left=left, right=right, gain=gain)

    def refresh(state: ShampooState, params: Tensors, context: Context) -> ShampooState:
        roots = []
        for factors, old in ((state.left, state.left_root), (state.right, state.right_root)):
            new = {k: inverse_root(s, 4, ridge=ridge) for k, s in factors.items()}
            roots.append({k: torch.where(all_finite(r), r, old[k]) for k, r in new.items()})
        return state._replace(left_root=roots[0], right_root=roots[1])

    def bind(facts: Facts) -> Transform:
        assert base is not None
        return shampoo(shampoo_beta, beta1, base=bound(base, facts), every=every, ridge=ridge, graft=graft)

    return Transform(
        init,
        update,
        merge_hyperparameters(inner.hyperparameters, {b.name: b.value}),
        tuple(dict.fromkeys((SPECTRAL, *inner.roles))),
        name="shampoo" if base is None else f"shampoo({base.name})",
        bind=None if base is None or base.bind is None else bind,
        **around(inner, periodic("shampoo_roots", every, refresh, refresh)),
    )


# -- what the Kronecker preconditioners share -------------------------------------------------------------------------


def base_or_mean(what: str, base: Transform | None, beta1: Scalar) -> Transform:
    """What maps the gradient to the update: `base`, or the running mean ``lerp(mu, g, 1 - beta1)``."""
    if base is None:
        return momentum(declare("beta1", beta1))
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} moves the gradient point; put {what}() inside it, not around it.")
    return base


def periodic(name: str, every: int, update: Any, first: Any) -> Periodic:
    """`Periodic`, whose `every` has been looked at."""
    if every < 1:
        raise ValueError(f"every={every} is not a number of updates; use 1 or more.")
    return Periodic(name, every, update, first)


def around(base: Transform, own: Periodic) -> dict[str, Any]:
    """What `wrapped` passes on of `base`, with the preconditioner's own periodic work, and its gain to be seen."""
    passed, tells = wrapped(base), base.diagnostics

    def diagnostics(state: Any) -> dict[str, Tensor]:
        return {**({} if tells is None else tells(state.base)), "comp/shampoo_gain": state.gain}

    return {**passed, "periodic": (*passed["periodic"], own), "diagnostics": diagnostics}


def zero_factors(params: Tensors, what: str) -> tuple[Tensors, Tensors]:
    """Zeros ``[..., m, m]`` and ``[..., n, n]`` for matrices ``[..., m, n]``; ValueError for what is not a matrix."""
    for k, p in params.items():
        if p.ndim < 2:
            raise ValueError(f"{what}() preconditions matrices; {k!r} has shape {tuple(p.shape)}. Give it to AdamW.")
    left = {k: p.new_zeros(*p.shape[:-1], p.size(-2)) for k, p in params.items()}
    return left, {k: p.new_zeros(*p.shape[:-2], p.size(-1), p.size(-1)) for k, p in params.items()}


def mean_factors(left: Tensors, right: Tensors, gradients: Tensors, beta: Tensor) -> tuple[Tensors, Tensors]:
    """The running averages of G Gᵀ and Gᵀ G."""
    new_left = {k: left[k] + (1 - beta) * (g @ g.mT - left[k]) for k, g in gradients.items()}
    return new_left, {k: right[k] + (1 - beta) * (g.mT @ g - right[k]) for k, g in gradients.items()}


def eye_like(s: Tensor) -> Tensor:
    """An identity for every square matrix of `s`, in memory of its own."""
    return torch.eye(s.size(-1), dtype=s.dtype, device=s.device).expand_as(s).clone()


def gain_of(after: Tensors, before: Tensors) -> Tensor:
    """``‖after‖ / ‖before‖`` over all matrices, 0-dim; 0 where nothing came in."""
    gain = global_norm(after) / _above_zero(global_norm(before))
    return gain.to(ones_like_scalar(before).dtype)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt()


def _above_zero(norm: Tensor) -> Tensor:
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)
