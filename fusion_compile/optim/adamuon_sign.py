"""AdaMuon as its authors have it: the sign of the momentum is orthogonalized (Si, Li & Lin, 2507.11005)."""

from __future__ import annotations

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import chain, partition
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    SPECTRAL,
    Context,
    Named,
    Transform,
    pair_of,
    stateless,
)
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.normalize_entries import normalize_entries
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_adam import scale_by_adam
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_momentum import scale_by_momentum
from fusion_compile.optim.stored import stored_as


def adamuon_sign(
    lr: float | Schedule = 0.02,
    momentum_decay: float = 0.95,
    weight_decay: float = 0.01,
    *,
    nesterov: bool = True,
    matmul_dtype: torch.dtype | str = "auto",
    scalar_lr: float | Schedule = 3e-4,
    scalar_betas: tuple[float, float] = (0.9, 0.95),
    scalar_eps: float = 1e-8,
    scalar_weight_decay: float = 0.0,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """AdaMuon on hidden matrices; AdamW on the rest. 8 bytes a parameter, fewer with codecs.

    Matrices: momentum → sign → Newton-Schulz → `normalize_entries` → decay → lr. K-Optimizers' AdaMuon is `adamuon`.
    Source: 2507.11005 and its code. Deviations: nu is fp32, there bf16. The sign makes it chaotic: two kernels differ
    by a tenth after 120 updates.

    Args:
        lr: In AdamW's unit: an update has root mean square 0.2 lr.
        momentum_decay: Decay of the momentum and of the second moment, which share it. Live as ``momentum``.
        weight_decay: Per unit of lr.
        nesterov: Look ahead from the new average.
        matmul_dtype: See `orthogonalize`.
        scalar_lr: AdamW's, as all numbers that begin with ``scalar_``.
        scalar_betas: Live as ``scalar_beta1`` and ``scalar_beta2``.
        scalar_eps: AdamW's.
        scalar_weight_decay: AdamW's.
        momentum: Codec of the momenta; see `stored`.
        second_moment: Codec of the second moments; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        TypeError: `scalar_betas` is not a pair.
        ValueError: `matmul_dtype` or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adamuon_sign(0.01).roles
        ('spectral', 'scalar')
    """

    def sign(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        return {k: u.sign() for k, u in updates.items()}

    beta = Named("momentum", momentum_decay)
    spectral = chain(
        scale_by_momentum(beta, nesterov=nesterov),
        stateless(sign, {}, "sign"),
        orthogonalize(None, matmul_dtype=matmul_dtype),
        normalize_entries(beta),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    beta1, beta2 = pair_of(scalar_betas, "scalar_betas")
    scalar = chain(
        scale_by_adam((Named("scalar_beta1", beta1), Named("scalar_beta2", beta2)), Named("scalar_eps", scalar_eps)),
        add_decayed_weights(Named("scalar_weight_decay", scalar_weight_decay)),
        scale_by_learning_rate(Named("scalar_lr", scalar_lr)),
    )
    return stored_as(partition({SPECTRAL: spectral, ELEMENTWISE: scalar}, "adamuon_sign"), momentum, second_moment)
