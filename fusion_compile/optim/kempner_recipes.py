"""Recipes of KempnerForge: its Muon and its Schedule-Free AdamW. Its AdamW and Lion are `adamw` and `lion`."""

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
    Number,
    Transform,
    pair_of,
    stateless,
)
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_adam import scale_by_adam
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_rms import scale_by_rms
from fusion_compile.optim.scale_by_shape import scale_by_shape
from fusion_compile.optim.schedule_free import schedule_free
from fusion_compile.optim.stored import stored_as


def kempner_muon(
    lr: Number = 0.02,
    momentum_decay: Number = 0.95,
    weight_decay: Number = 0.1,
    *,
    adam_ratio: float = 1.0,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    adam_weight_decay: float | Schedule = 0.0,
    max_aspect: float = 10.0,
    ns_steps: int = 5,
    matmul_dtype: torch.dtype | str = "auto",
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """Muon without Nesterov on matrices at most `max_aspect` times as long as wide; AdamW on the rest.

    The rest's rate *is* lr times a factor, so it follows every schedule and every write. 4 bytes a parameter on
    matrices, 8 on the rest, fewer with codecs.
    Source: KempnerForge's Muon. Deviations: its heavy ball is 20 times the average here, which Newton-Schulz divides
    out; products run on the short side; embeddings, heads and matrices with a side under 128 are among the rest; the
    gradients of the rest are cleared with all others (there they never were).

    Args:
        lr: Spectral norm per step, times √max(1, r/c).
        momentum_decay: Decay of the average. Live as ``momentum``.
        weight_decay: Of matrices, per unit of lr.
        adam_ratio: The rest's lr over lr.
        adam_betas: Live as ``scalar_beta1`` and ``scalar_beta2``.
        adam_eps: Live as ``scalar_eps``.
        adam_weight_decay: Of the rest, per unit of its lr. Live as ``scalar_weight_decay``.
        max_aspect: See above.
        ns_steps: Newton-Schulz iterations, 1 to 5.
        matmul_dtype: See `orthogonalize`; fp32 in the source.
        momentum: Codec of the momenta; see `stored`.
        second_moment: Codec of the second moments; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        TypeError: `adam_betas` is not a pair.
        ValueError: A number is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> list(optim.kempner_muon(optim.rex(0.02, total_steps=1000)).hyperparameters)[:3]
        ['momentum', 'weight_decay', 'lr']
    """
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect={max_aspect!r} must be at least 1, the aspect of a square.")
    if ns_steps not in range(1, 6):
        raise ValueError(f"ns_steps={ns_steps!r} is not a number of Newton-Schulz iterations; give 1 to 5.")

    def slower(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        return {k: adam_ratio * u for k, u in updates.items()}

    spectral = chain(
        orthogonalize(momentum_decay, nesterov=False, matmul_dtype=matmul_dtype, iterations=ns_steps),
        scale_by_shape("original"),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    beta1, beta2 = pair_of(adam_betas, "adam_betas")
    rest = chain(
        scale_by_adam((Named("scalar_beta1", beta1), Named("scalar_beta2", beta2)), Named("scalar_eps", adam_eps)),
        add_decayed_weights(Named("scalar_weight_decay", adam_weight_decay)),
        stateless(slower, {}, "adam_ratio"),
        scale_by_learning_rate(lr),
    )
    whole = partition({SPECTRAL: spectral, ELEMENTWISE: rest}, "kempner_muon").with_extras(max_aspect=max_aspect)
    return stored_as(whole, momentum, second_moment)


def kempner_sf_adamw(
    lr: Number = 0.025,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    second_moment: str = "fp32",
) -> Transform:
    """Schedule-Free AdamW whose average weighs each step by lr, not by its square. 8 bytes a parameter.

    Source: KempnerForge's ScheduleFreeAdamW, which keeps x too, 12 bytes. Deviations: decay acts at z with the step,
    there after it: they differ by lr² decay.

    Args:
        lr: Size of a step of one entry of z.
        betas: β of the gradient point, live as ``schedule_free_beta``, and β₂, live as ``beta2``.
        eps: Added to the root of the second moment.
        weight_decay: Per unit of lr, at z.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for parameters of any shape.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A number is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.kempner_sf_adamw(optim.constant(0.025, warmup_steps=100)).descends
        True
    """
    beta, beta2 = pair_of(betas)
    z_step = chain(scale_by_rms(beta2, eps), add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
    whole = schedule_free(stored_as(z_step, second_moment=second_moment), lr, beta, weight_lr_power=1.0, average="lr")
    return whole.with_extras(name="kempner_sf_adamw")
