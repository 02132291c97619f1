"""Hyperball: every weight matrix stays on the sphere of its initial norm (2606.16899)."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    SPECTRAL,
    BankInfos,
    Context,
    Extras,
    Named,
    Number,
    Transform,
    by_name,
    declare,
)


class HyperballState(NamedTuple):
    """`radius`: ‖W₀‖ of every matrix, ``[..., 1, 1]``."""

    radius: Tensors


def hyperball(lr: Number = 0.02) -> Transform:
    """``W ← R Norm(W - lr R Norm(u))`` with ``Norm(X) = X / ‖X‖`` and ``R = ‖W₀‖``: the last part of a chain.

    It replaces decay and `scale_by_learning_rate`. u is the incoming direction, of any scale; the update is the
    difference to add to W. R is taken when the state is made, so load weights before; each matrix of ``[..., m, n]``
    has its own. Norms are computed in at least fp32. A zero direction or lr leaves W bit for bit. 4 bytes a matrix.

    A matrix that starts at zero has no sphere and would stay zero for ever: it takes the plain step ``-lr u``, without
    decay and in u's own scale, and `init` warns once with the names. Start it away from zero, or route it elsewhere.
    For matrices between norms: not for embeddings, output heads or gains. Do not combine it with `schedule_free`: the
    average of points of the sphere lies inside it.

    Source: the update of the paper's abstract (2606.16899); NVIDIA Emerging-Optimizers' ``hyperball`` hook. Deviations:
    a matrix that starts at zero trains (NVIDIA refuses it; this is FusionOpt's later choice); ‖W - lr R Norm(u)‖ is
    computed from ‖W‖, ‖u‖ and ⟨W, u⟩, so that the bank is read once for all norms: exact to rounding while lr is below
    about 0.5, and bounded beyond.

    Args:
        lr: The relative step, about the angle in radians by which W turns (0.02 is usual; **not** Muon's lr). Live.

    Returns:
        A transform that takes a step, for the role ``"spectral"``.

    Example:
        >>> from fusion_compile import optim
        >>> matrices = optim.chain(optim.orthogonalize(0.95), optim.hyperball(0.02))
        >>> muon_h = optim.partition({"spectral": matrices, "scalar": optim.adamw(optim.Named("scalar_lr", 3e-4))})
        >>> muon_h.descends
        True
    """
    return _hyperball(declare("lr", lr), {})


def _hyperball(rate: Named, infos: BankInfos) -> Transform:

    def init(params: Tensors) -> HyperballState:
        radius = {k: _dot(p, p).sqrt().to(p.dtype) for k, p in params.items()}
        _warn_of_zeros(radius, infos)
        return HyperballState(radius)

    def update(
        updates: Tensors, state: HyperballState, params: Tensors, context: Context
    ) -> tuple[Tensors, HyperballState]:
        lr = context.hyperparameters[rate.name]
        moves = {k: _step(params[k], u, state.radius[k], lr) for k, u in updates.items()}
        return moves, HyperballState({k: r.clone() for k, r in state.radius.items()})

    def bind(infos: BankInfos) -> Transform:
        return _hyperball(rate, infos)

    return Transform(init, update, Extras("hyperball", by_name(rate), (SPECTRAL,), bind=bind, descends=True))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each matrix, ``[..., 1, 1]``, in at least fp32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum(-1, keepdim=True).sum(-2, keepdim=True)


def _step(w: Tensor, u: Tensor, radius: Tensor, lr: Tensor) -> Tensor:
    ww, wu, uu = _dot(w, w), _dot(w, u), _dot(u, u)
    radius, norm_u = radius.to(uu.dtype), uu.sqrt()
    zero, on_sphere = torch.zeros_like(uu), radius > 0
    length = torch.where(norm_u > 0, lr * radius / norm_u, zero)  # W - length u lies before the retraction
    tilde = ww - 2 * length * wu + length * length * uu
    # The clamp matters only where lr is near 1 and u along W, so that nearly nothing is left to normalize.
    retract = radius / tilde.clamp(min=0).sqrt().maximum(1e-3 * radius)
    stays = length == 0
    of_w = torch.where(on_sphere & ~stays, retract - 1, zero)
    of_u = torch.where(on_sphere, torch.where(stays, zero, -retract * length), -lr)
    return of_w.to(w.dtype) * w + of_u.to(w.dtype) * u


def _warn_of_zeros(radius: Tensors, infos: BankInfos) -> None:
    names: list[str] = []
    for key, r in radius.items():
        if r.device.type == "meta" or type(r) is not Tensor:  # traced without values
            continue
        named = {place.at: place.name for place in infos[key].places} if key in infos else {}
        zeros = (r.reshape(-1) == 0).tolist()
        names += [named.get(i, f"{key}[{i}]") for i, is_zero in enumerate(zeros) if is_zero]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(
            f"hyperball(): {shown} {'starts' if len(names) == 1 else 'start'} at norm zero, where there is no sphere "
            f"to stay on; the plain step -lr * u is taken there. Initialize away from zero, or route to 'scalar' with "
            f"force_scalar.",
            UserWarning,
            stacklevel=3,
        )
