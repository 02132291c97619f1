"""Recipes without a schedule: Schedule-Free over AdamW, and over NorMuon, which is the default."""

from __future__ import annotations

import torch

from fusion_compile.optim._combine import chain, partition
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import ELEMENTWISE, SPECTRAL, Named, Transform, pair_of
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.normalize_neurons import normalize_neurons
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_rms import scale_by_rms
from fusion_compile.optim.schedule_free import schedule_free
from fusion_compile.optim.stored import decay_and_codec, stored_as


def sf_adamw(
    lr: float | Schedule = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    decay_at: str = "y",
    second_moment: str = "fp32",
) -> Transform:
    """Schedule-Free AdamW for every parameter. 8 bytes a parameter, fewer with codecs: it keeps z and a second moment.

    Source: 2405.15682, ``schedulefree.AdamWScheduleFree``. Deviations: none.

    Args:
        lr: Size of a step of one entry of z; 1 to 10 times a scheduled AdamW's. Warm it up with ``constant(lr,
            warmup_steps)``.
        betas: β of the gradient point ``y = β x + (1 - β) z``, live as ``schedule_free_beta``, and β₂ of the second
            moment, live as ``beta2``.
        eps: Added to the root of the second moment.
        weight_decay: Per unit of lr.
        decay_at: ``"y"`` (the official default) or ``"z"``: the weights that decay.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``. z: ``stored(…, z="bf16")``.

    Returns:
        A complete optimizer for parameters of any shape.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: `decay_at` is not one of the two, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.sf_adamw(optim.constant(2.5e-3, warmup_steps=100), betas=(0.95, 0.999)).hyperparameters["beta2"]
        0.999
    """
    if decay_at not in ("y", "z"):
        raise ValueError(f"decay_at={decay_at!r} is not known; use 'y' or 'z'.")
    beta, beta2 = pair_of(betas)
    parts = [scale_by_rms(beta2, eps)]
    if decay_at == "z":
        parts.append(add_decayed_weights(weight_decay))
    base = chain(*parts, scale_by_learning_rate(lr), name="adamw")
    whole = schedule_free(base, lr, beta, decay_at_y=weight_decay if decay_at == "y" else None)
    return stored_as(whole, second_moment=second_moment)


def sf_normuon(
    lr: float | Schedule = 8e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float | str = 0.8,
    weight_decay: float = 0.05,
    *,
    coefficients: str = "jordan",
    matmul_dtype: torch.dtype | str = "auto",
    gram_restarts: tuple[int, ...] | str | None = "auto",
    eps: float = 1e-8,
    scalar_beta2: float = 0.999,
    second_moment: str = "fp32",
) -> Transform:
    """SF-NorMuon, the default: Schedule-Free over NorMuon on hidden matrices, SF-AdamW on the rest.

    Momentum is a plain average without Nesterov; all decay acts at z. No schedule is needed. 8 bytes a parameter.
    Source: 2605.23061. Deviations: the paper's own code was not readable; the equations are those of two agreeing
    third-party ports.

    Args:
        lr: One for both parts, in AdamW's unit (a matrix update has root mean square 0.2 lr). A warm-up is
            ``constant(lr, warmup_steps)``.
        betas: β of the gradient point ``y = β x + (1 - β) z``, live as ``schedule_free_beta``, and β₂ of NorMuon's row
            means, live as ``beta2``.
        momentum: Decay of the average on matrices; or its codec (see `stored`), at 0.8.
        weight_decay: Per unit of lr.
        coefficients: See `orthogonalize`.
        matmul_dtype: See `orthogonalize`.
        gram_restarts: See `orthogonalize`.
        eps: Of `normalize_neurons`, and of Adam as ``scalar_eps``.
        scalar_beta2: β₂ of SF-AdamW.
        second_moment: Codec of the second moments; ``"int8"`` means ``"int8_companded"``. z: ``stored(…, z="bf16")``.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: `coefficients`, `matmul_dtype`, `gram_restarts` or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.sf_normuon(optim.constant(8e-3, warmup_steps=100)).roles
        ('spectral', 'scalar')
    """
    beta, beta2 = pair_of(betas)
    decay, codec = decay_and_codec(momentum, 0.8)
    polar = orthogonalize(
        decay, nesterov=False, coefficients=coefficients, matmul_dtype=matmul_dtype, gram_restarts=gram_restarts
    )
    spectral = chain(
        polar,
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
    whole = partition(
        {SPECTRAL: schedule_free(spectral, lr, beta), ELEMENTWISE: schedule_free(scalar, lr, beta)}, name="sf_normuon"
    )
    return stored_as(whole, codec, second_moment)
