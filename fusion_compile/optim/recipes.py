"""The cookbook: each recipe is a chain of published parts. `RECIPES` lists them by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusion_compile.optim._combine import chain, partition
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import ELEMENTWISE, SPECTRAL, Named, Transform
from fusion_compile.optim.decay_weights import add_decayed_weights
from fusion_compile.optim.fusion import full_fusion
from fusion_compile.optim.lion import scale_by_lion
from fusion_compile.optim.normalize_neurons import normalize_neurons
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_adam import scale_by_adam, scale_by_rms
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_shape import scale_by_shape
from fusion_compile.optim.schedule_free import schedule_free


def adamw(
    lr: float | Schedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Transform:
    """AdamW for every parameter (1711.05101), as ``torch.optim.AdamW``. lr: size of a step of one entry. 8 bytes a
    parameter."""
    return chain(
        scale_by_adam(betas[0], betas[1], eps),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        name="adamw",
    )


def _scalar_adamw(lr: float | Schedule, betas: tuple[float, float], eps: float, weight_decay: float) -> Transform:
    return chain(
        scale_by_adam(Named("scalar_beta1", betas[0]), Named("scalar_beta2", betas[1]), Named("scalar_eps", eps)),
        add_decayed_weights(Named("scalar_weight_decay", weight_decay)),
        scale_by_learning_rate(Named("scalar_lr", lr)),
        name="adamw",
    )


def muon(
    lr: float | Schedule = 1e-3,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    *,
    nesterov: bool = True,
    adjust_lr: str = "original",
    table: str = "jordan",
    hot_dtype: torch.dtype | str = torch.bfloat16,
    gram_restarts: tuple[int, ...] | str | None = None,
    scalar_lr: float | Schedule = 3e-4,
    scalar_betas: tuple[float, float] = (0.9, 0.95),
    scalar_eps: float = 1e-8,
    scalar_weight_decay: float = 0.0,
) -> Transform:
    """Muon on hidden matrices, as ``torch.optim.Muon``; AdamW on the rest under the ``scalar_`` names.

    lr: with ``adjust_lr="original"`` in units of spectral norm per step (times √max(1, r/c)), with
    ``"match_rms_adamw"`` in AdamW's. The decay is times the unadjusted lr. `gram_restarts`: see `orthogonalize`.
    4 bytes a parameter on matrices.
    """
    spectral = chain(
        orthogonalize(momentum, nesterov=nesterov, table=table, hot_dtype=hot_dtype, gram_restarts=gram_restarts),
        scale_by_shape(adjust_lr),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    scalar = _scalar_adamw(scalar_lr, scalar_betas, scalar_eps, scalar_weight_decay)
    return partition({SPECTRAL: spectral, ELEMENTWISE: scalar}, name="muon")


def normuon(
    lr: float | Schedule = 0.02,
    momentum: float = 0.95,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = True,
    scale: str = "preserve_norm",
    table: str = "jordan",
    hot_dtype: torch.dtype | str = torch.bfloat16,
    gram_restarts: tuple[int, ...] | str | None = "auto",
    scalar_lr: float | Schedule = 3e-4,
    scalar_betas: tuple[float, float] = (0.9, 0.95),
    scalar_eps: float = 1e-8,
    scalar_weight_decay: float = 0.0,
) -> Transform:
    """NorMuon (2510.05491) on hidden matrices; AdamW on the rest under the ``scalar_`` names.

    lr: with ``scale="preserve_norm"`` in units of spectral norm per step (times √max(1, r/c), as the authors' code),
    with ``"match_rms"`` in AdamW's (an update's root mean square is 0.2 lr). 4 bytes a parameter plus 4 a row on
    matrices. Deviations: Newton-Schulz divides by a norm clamped at 1e-7, as torch's Muon, where the authors add 1e-7
    to it.
    """
    spectral = chain(
        orthogonalize(momentum, nesterov=nesterov, table=table, hot_dtype=hot_dtype, gram_restarts=gram_restarts),
        normalize_neurons(beta2, scale=scale),
        scale_by_shape("original" if scale == "preserve_norm" else "none"),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    scalar = _scalar_adamw(scalar_lr, scalar_betas, scalar_eps, scalar_weight_decay)
    return partition({SPECTRAL: spectral, ELEMENTWISE: scalar}, name="normuon")


def sf_adamw(
    lr: float | Schedule = 2.5e-3,
    beta: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    decay_at: str = "y",
) -> Transform:
    """Schedule-Free AdamW for every parameter (2405.15682), as ``schedulefree.AdamWScheduleFree``.

    lr: size of a step of one entry of z; 1 to 10 times a scheduled AdamW's; warm it up with ``constant(lr,
    warmup_steps)``. `decay_at`: ``"y"`` (the official default) or ``"z"``. 8 bytes a parameter.
    """
    if decay_at not in ("y", "z"):
        raise ValueError(f"decay_at={decay_at!r} is not known; use 'y' or 'z'.")
    parts = [scale_by_rms(beta2, eps)]
    if decay_at == "z":
        parts.append(add_decayed_weights(weight_decay))
    base = chain(*parts, scale_by_learning_rate(lr), name="adamw")
    return schedule_free(base, lr, beta, decay_at_y=weight_decay if decay_at == "y" else None)


def sf_normuon(
    lr: float | Schedule = 8e-3,
    beta: float = 0.9,
    momentum: float = 0.8,
    beta2: float = 0.95,
    weight_decay: float = 0.05,
    *,
    table: str = "jordan",
    hot_dtype: torch.dtype | str = torch.bfloat16,
    gram_restarts: tuple[int, ...] | str | None = "auto",
    eps: float = 1e-8,
    scalar_beta2: float = 0.999,
) -> Transform:
    """SF-NorMuon (2605.23061), the default: Schedule-Free over NorMuon on hidden matrices, SF-AdamW on the rest.

    One lr for both, in AdamW's unit (a matrix update has root mean square 0.2 lr). Momentum is a plain average
    without Nesterov; all decay acts at z. No schedule is needed; a warm-up is ``constant(lr, warmup_steps)``. 8 bytes
    a parameter. Deviations: the paper's own code was not readable; the equations are those of two agreeing
    third-party ports.
    """
    spectral = chain(
        orthogonalize(momentum, nesterov=False, table=table, hot_dtype=hot_dtype, gram_restarts=gram_restarts),
        normalize_neurons(beta2, scale="match_rms", eps=eps),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        name="normuon",
    )
    scalar = chain(
        scale_by_rms(Named("scalar_beta2", scalar_beta2), Named("scalar_eps", eps)),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        name="adamw",
    )
    wrapped = {SPECTRAL: schedule_free(spectral, lr, beta), ELEMENTWISE: schedule_free(scalar, lr, beta)}
    return partition(wrapped, name="sf_normuon")


def lion(lr: float | Schedule = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> Transform:
    """Lion for every parameter (2302.06675), as ``lion-pytorch``. lr: every entry moves by it, so 3 to 10 times under
    AdamW's, with a decay as many times over. 4 bytes a parameter."""
    return chain(
        scale_by_lion(betas[0], betas[1]),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        name="lion",
    )


RECIPES: dict[str, Callable[..., Transform]] = {
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
    "normuon": normuon,
    "sf_adamw": sf_adamw,
    "sf_normuon": sf_normuon,
    "full_fusion": full_fusion,
}
