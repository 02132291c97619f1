"""Shampoo: an update between inverse fourth roots of its rows' and columns' covariances (Gupta et al., 1802.09568)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._kronecker import (
    above_zero,
    base_or_mean,
    eye_like,
    gain_of,
    mean_factors,
    periodic,
    preconditioner,
    zero_factors,
)
from fusion_compile.optim._transform import Context, Number, State, Transform, by_name, declare
from fusion_compile.optim._tree import map_tensors, number_like
from fusion_compile.optim.matrix.inverse_roots import all_finite, check_root, inverse_root

GRAFTS = ("none", "norm")


class ScaleByShampooState(NamedTuple):
    """`base`: state of the map from gradient to update. Of matrices ``[..., m, n]``: `left` ``[..., m, m]`` and `right`
    ``[..., n, n]`` running covariances, `left_root` and `right_root` their inverse fourth roots. `gain`: 0-dim, norm of
    the preconditioned update over that of the incoming one, all matrices together."""

    base: State
    left: Tensors
    right: Tensors
    left_root: Tensors
    right_root: Tensors
    gain: Tensor


def scale_by_shampoo(
    beta: Number = 0.9,
    shampoo_beta: Number = 0.95,
    *,
    base: Transform | None = None,
    every: int = 10,
    ridge: float = 1e-4,
    graft: str = "none",
) -> Transform:
    """``L^(-1/4) U R^(-1/4)``; ``L ← β L + (1 - β) G Gᵀ``, ``R ← β R + (1 - β) Gᵀ G``, β = `shampoo_beta`.

    The roots are renewed after the first update and after every `every`-th, of ``L + ridge ‖L‖ I``, by a Newton
    iteration of matrix products (``matrix.inverse_roots``); update 1 is not preconditioned. A root that did not
    converge stays as it was.

    Memory for one m×n matrix in fp32: 8 (m/n + n/m) bytes a parameter, and 4 for U when `base` is None (square: 20;
    1:4: 38). Four products of matrices per update. Diagnostic: ``comp/shampoo_gain``.
    Source: the paper, with the running averages and the relative ridge (there 1e-6) of Anil et al., 2002.09018.
    Deviations: averages instead of sums, without bias correction; the roots are at most `every` updates old.

    Args:
        beta: Decay of ``U ← lerp(U, G, 1 - beta)`` if `base` is None. Live as ``beta1``.
        shampoo_beta: Decay of L and R. Live.
        base: A transform that maps the gradient to U (momentum, MONA, …); L and R are built from the gradient itself.
        every: Updates between two renewals of the roots.
        ridge: Relative to the largest row sum: an absolute ridge turns the preconditioner into the identity when
            gradients are small. 1e-4 is the smallest with which TensorFloat32 products converge; true fp32 products
            converge with 1e-6.
        graft: ``"norm"`` gives the result the norm of U, matrix by matrix. ``"none"`` leaves its own, so only a part
            that ignores it should follow (an orthogonalization): a gradient that grows is multiplied by roots that were
            made for small ones, and the weights diverge.

    Returns:
        A transform for matrices ``[..., m, n]``, role ``"spectral"``; it takes a step if `base` does. The unit of lr is
        U's with ``"norm"``.

    Raises:
        ValueError: `graft`, `ridge` or `every` is not one of the above; `base` moves the gradient point. `init` refuses
            vectors.

    Example:
        >>> from fusion_compile import optim
        >>> momentum = optim.scale_by_momentum(0.95)
        >>> direction = optim.chain(optim.scale_by_shampoo(base=momentum), optim.orthogonalize(None))
        >>> direction.descends
        False
    """
    if graft not in GRAFTS:
        raise ValueError(f"graft={graft!r} is not known; use one of {', '.join(map(repr, GRAFTS))}.")
    check_root(4, ridge)
    inner, b = base_or_mean("scale_by_shampoo", base, beta), declare("shampoo_beta", shampoo_beta)

    def init(params: Tensors) -> ScaleByShampooState:
        left, right = zero_factors(params, "scale_by_shampoo")
        left_root, right_root = map_tensors(eye_like, left), map_tensors(eye_like, right)
        return ScaleByShampooState(inner.init(params), left, right, left_root, right_root, number_like(params, 0.0))

    def update(
        updates: Tensors, state: ScaleByShampooState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByShampooState]:
        beta = context.hyperparameters[b.name]
        incoming, base_state = inner.update(updates, state.base, params, context)
        directions = map_tensors(lambda u, l, r: l @ u @ r, incoming, state.left_root, state.right_root)
        gain = gain_of(directions, incoming)
        if graft == "norm":
            directions = map_tensors(lambda d, u: d * (_norm(u) / above_zero(_norm(d))), directions, incoming)
        left, right = mean_factors(state.left, state.right, updates, beta)
        return directions, state._replace(base=base_state, left=left, right=right, gain=gain)

    def refresh(state: ScaleByShampooState, params: Tensors, context: Context) -> ScaleByShampooState:
        def renewed(factor: Tensor, old: Tensor) -> Tensor:
            root = inverse_root(factor, 4, ridge=ridge)
            return torch.where(all_finite(root), root, old)

        left_root = map_tensors(renewed, state.left, state.left_root)
        return state._replace(left_root=left_root, right_root=map_tensors(renewed, state.right, state.right_root))

    def rebuild(base: Transform) -> Transform:
        return scale_by_shampoo(beta, shampoo_beta, base=base, every=every, ridge=ridge, graft=graft)

    own = periodic("shampoo_roots", every, refresh, refresh)
    return Transform(init, update, preconditioner("scale_by_shampoo", base, inner, by_name(b), own, rebuild))


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt()
