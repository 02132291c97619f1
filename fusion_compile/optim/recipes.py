"""Recipes: complete optimizers, each a chain of published parts. `RECIPES` lists them by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fusion_compile.optim._combine import chain, partition
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import ELEMENTWISE, SPECTRAL, Named, Number, Transform, pair_of
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.fusion import full_fusion
from fusion_compile.optim.normalize_neurons import normalize_neurons
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_adam import scale_by_adam
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_lion import scale_by_lion
from fusion_compile.optim.scale_by_shape import scale_by_shape
from fusion_compile.optim.scale_by_soap import scale_by_soap
from fusion_compile.optim.schedule_free_recipes import sf_adamw, sf_normuon
from fusion_compile.optim.stored import decay_and_codec, stored_as


def _stepped(direction: Transform, lr: Number, weight_decay: Number, name: str | None = None) -> Transform:
    """`direction`, decoupled decay, learning rate."""
    return chain(direction, add_decayed_weights(weight_decay), scale_by_learning_rate(lr), name=name)


def _scalar_adamw(lr: float | Schedule, betas: tuple[float, float], eps: float, weight_decay: float) -> Transform:
    """AdamW for the parameters beside the matrices, whose numbers have names of their own."""
    beta1, beta2 = pair_of(betas, "scalar_betas")
    adam = scale_by_adam((Named("scalar_beta1", beta1), Named("scalar_beta2", beta2)), Named("scalar_eps", eps))
    return _stepped(adam, Named("scalar_lr", lr), Named("scalar_weight_decay", weight_decay), "adamw")


def adamw(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    *,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """AdamW for every parameter. 8 bytes a parameter, fewer with codecs.

    Source: 1711.05101, ``torch.optim.AdamW``. Deviations: none while the betas stay. Where they change, the bias is
    corrected by the product of those that were used, in torch by the present one to the power of the count.

    Args:
        lr: Size of a step of one entry.
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Added to the root of the second moment.
        weight_decay: Per unit of lr.
        momentum: Codec of the first moment; see `stored`.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for parameters of any shape.

    Raises:
        ValueError: A codec is not known, or cannot hold what it is given.

    Example:
        >>> import torch
        >>> import fusion_compile as fc
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = lambda model, x: model(x).square().mean()
        >>> step = fc.compile_training_step(model, loss_fn, optimizer=fc.optim.adamw(1e-2), mode="eager")
        >>> step(torch.ones(4, 2)).shape
        torch.Size([])
    """
    return stored_as(_stepped(scale_by_adam(betas, eps), lr, weight_decay, "adamw"), momentum, second_moment)


def muon(
    lr: float | Schedule = 1e-3,
    momentum: float | str = 0.95,
    weight_decay: float = 0.1,
    *,
    nesterov: bool = True,
    scale: str = "original",
    coefficients: str = "jordan",
    matmul_dtype: torch.dtype | str = "auto",
    gram_restarts: tuple[int, ...] | str | None = None,
    scalar_lr: float | Schedule = 3e-4,
    scalar_betas: tuple[float, float] = (0.9, 0.95),
    scalar_eps: float = 1e-8,
    scalar_weight_decay: float = 0.0,
    max_aspect: float = math.inf,
    second_moment: str = "fp32",
) -> Transform:
    """Muon on hidden matrices; AdamW on the rest. 4 bytes a parameter on matrices, 8 on the rest; fewer with codecs.

    Source: Jordan et al. 2024, ``torch.optim.Muon``. Deviations: none.

    Args:
        lr: With ``scale="original"`` in units of spectral norm per step (times √max(1, r/c)), with
            ``"match_rms_adamw"`` in AdamW's.
        momentum: Decay of the average; or the codec of the momenta, here and on the rest (see `stored`), at 0.95.
        weight_decay: Per unit of the unscaled lr.
        nesterov: Look ahead from the new average.
        scale: ``"original"``, ``"match_rms_adamw"`` or ``"none"``; torch's ``adjust_lr_fn``. See `scale_by_shape`.
        coefficients: See `orthogonalize`.
        matmul_dtype: See `orthogonalize`.
        gram_restarts: See `orthogonalize`.
        scalar_lr: AdamW's, as all numbers that begin with ``scalar_``.
        scalar_betas: Live as ``scalar_beta1`` and ``scalar_beta2``.
        scalar_eps: AdamW's.
        scalar_weight_decay: AdamW's.
        max_aspect: Matrices more than so many times as long as wide are among the rest.
        second_moment: Codec of AdamW's second moment; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        ValueError: `scale`, `coefficients`, `matmul_dtype`, `gram_restarts` or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.muon(0.02, scale="match_rms_adamw").hyperparameters["scalar_lr"]
        0.0003
    """
    decay, codec = decay_and_codec(momentum, 0.95)
    polar = orthogonalize(
        decay,
        nesterov=nesterov,
        coefficients=coefficients,
        matmul_dtype=matmul_dtype,
        gram_restarts=gram_restarts,
    )
    spectral = chain(polar, scale_by_shape(scale), add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
    scalar = _scalar_adamw(scalar_lr, scalar_betas, scalar_eps, scalar_weight_decay)
    whole = partition({SPECTRAL: spectral, ELEMENTWISE: scalar}, name="muon")
    return stored_as(whole.with_extras(max_aspect=max_aspect), codec, second_moment)


def normuon(
    lr: float | Schedule = 0.02,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float = 0.0,
    *,
    nesterov: bool = True,
    scale: str = "preserve_norm",
    coefficients: str = "jordan",
    matmul_dtype: torch.dtype | str = "auto",
    gram_restarts: tuple[int, ...] | str | None = "auto",
    scalar_lr: float | Schedule = 3e-4,
    scalar_betas: tuple[float, float] = (0.9, 0.95),
    scalar_eps: float = 1e-8,
    scalar_weight_decay: float = 0.0,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """NorMuon on hidden matrices; AdamW on the rest. On matrices 4 bytes a parameter plus 4 a row, 8 on the rest.

    Source: 2510.05491 and the authors' code. Deviations: Newton-Schulz divides by a norm clamped at 1e-7, as torch's
    Muon; the authors add 1e-7 to it.

    Args:
        lr: With ``scale="preserve_norm"`` in units of spectral norm per step (times √max(1, r/c), as the authors'
            code), with ``"match_rms"`` in AdamW's (an update's root mean square is 0.2 lr).
        betas: β₁, decay of the average, live as ``momentum``, and β₂ of the row means, live as ``beta2``.
        weight_decay: Per unit of the unscaled lr.
        nesterov: Look ahead from the new average.
        scale: ``"preserve_norm"`` or ``"match_rms"``. See `normalize_neurons`.
        coefficients: See `orthogonalize`.
        matmul_dtype: See `orthogonalize`.
        gram_restarts: See `orthogonalize`.
        scalar_lr: AdamW's, as all numbers that begin with ``scalar_``.
        scalar_betas: Live as ``scalar_beta1`` and ``scalar_beta2``.
        scalar_eps: AdamW's.
        scalar_weight_decay: AdamW's.
        momentum: Codec of the momenta, on matrices and on the rest; see `stored`.
        second_moment: Codec of second moments; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: `scale`, `coefficients`, `matmul_dtype`, `gram_restarts` or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.normuon(optim.wsd(0.02, total_steps=1000, warmup_steps=100))
        >>> optimizer.name
        'normuon'
    """
    beta1, beta2 = pair_of(betas)
    polar = orthogonalize(
        beta1,
        nesterov=nesterov,
        coefficients=coefficients,
        matmul_dtype=matmul_dtype,
        gram_restarts=gram_restarts,
    )
    spectral = chain(
        polar,
        normalize_neurons(beta2, scale=scale),
        scale_by_shape("original" if scale == "preserve_norm" else "none"),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    scalar = _scalar_adamw(scalar_lr, scalar_betas, scalar_eps, scalar_weight_decay)
    whole = partition({SPECTRAL: spectral, ELEMENTWISE: scalar}, name="normuon")
    return stored_as(whole, momentum, second_moment)


def lion(
    lr: float | Schedule = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    momentum: str = "fp32",
) -> Transform:
    """Lion for every parameter. 4 bytes a parameter, 1.01 with ``momentum="int8"``, 0.53 with ``"4bit"``.

    Source: 2302.06675, ``lion_pytorch.Lion``. Deviations: none.

    Args:
        lr: Every entry moves by it, so 3 to 10 times smaller than AdamW's.
        betas: β₁ of the step and β₂ of the momentum. Live as ``beta1`` and ``beta2``.
        weight_decay: Per unit of lr; as many times larger than AdamW's as lr is smaller.
        momentum: Codec of the first moment; see `stored`.

    Returns:
        A complete optimizer for parameters of any shape.

    Raises:
        ValueError: A codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.lion(1e-4, weight_decay=1.0).name
        'lion'
    """
    return stored_as(_stepped(scale_by_lion(betas), lr, weight_decay, "lion"), momentum)


def soap(
    lr: float | Schedule = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float = 0.95,
    weight_decay: float = 0.01,
    *,
    every: int = 10,
    eps: float = 1e-8,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """SOAP on hidden matrices; AdamW with the same numbers on the rest, as in the paper.

    Memory on matrices: 8 + 8 (r/c + c/r) bytes a parameter, 8 on the rest.
    Source: 2409.11321 and the defaults of nikhilvyas/SOAP ``soap.py``. Deviations: those of `scale_by_soap`; decay acts
    with the step instead of after it, and at the first update too; embeddings and the last layer get AdamW.

    Args:
        lr: One for both parts, in AdamW's unit.
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        shampoo_beta: Decay of the covariances.
        weight_decay: Per unit of lr.
        every: Updates between two refreshes of the bases (``precondition_frequency``).
        eps: Added to the root of the second moment; live for AdamW.
        momentum: Codec of the first moments; see `stored`.
        second_moment: Codec of the second moments; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        ValueError: `every` is below 1, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.soap(optim.cosine(3e-3, 1000, warmup_steps=100)).roles
        ('spectral', 'scalar')
    """
    spectral = _stepped(scale_by_soap(betas, shampoo_beta, every=every, eps=eps), lr, weight_decay)
    whole = partition({SPECTRAL: spectral, ELEMENTWISE: adamw(lr, betas, eps, weight_decay)}, name="soap")
    return stored_as(whole, momentum, second_moment)


RECIPES: dict[str, Callable[..., Transform]] = {
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
    "normuon": normuon,
    "sf_adamw": sf_adamw,
    "sf_normuon": sf_normuon,
    "soap": soap,
    "full_fusion": full_fusion,
}
