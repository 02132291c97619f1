"""Recipes of the K-Optimizers line: Adafactor's second moment, momentum behind it, few bytes."""

from __future__ import annotations

import math

import torch

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import chain, partition
from fusion_compile.optim._look_ahead import look_ahead
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    MATRIX,
    Context,
    Number,
    State,
    Transform,
    by_name,
    declare,
    pair_of,
    stateless,
)
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.average_steps import average_steps, descend, keeps_average
from fusion_compile.optim.cautious import cautious
from fusion_compile.optim.centralize_gradients import centralize_gradients
from fusion_compile.optim.clip_update_rms import clip_update_rms
from fusion_compile.optim.codecs.all_codecs import codec_of
from fusion_compile.optim.correct_bias import correct_bias
from fusion_compile.optim.mechanic import mechanic
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_adapnm import scale_by_adapnm
from fusion_compile.optim.scale_by_factored_rms import scale_by_factored_rms
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_momentum import scale_by_momentum
from fusion_compile.optim.stored import stored, stored_as


def _descending(moved: Transform, is_cautious: bool, centralize: bool, name: str) -> Transform:
    """The step of `moved`, whose results hold the lr: masked and after centred gradients, as asked."""
    masked = cautious(moved) if is_cautious else moved
    return chain(*([centralize_gradients()] if centralize else []), masked, descend(), name=name)


def adakaon(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    weight_decay: Number = 0.0,
    *,
    momentum: str = "bf16",
    eps: float = 1e-30,
    clip_threshold: float = 1.0,
    is_cautious: bool = True,
    centralize: bool = True,
) -> Transform:
    """Adafactor's direction, clipped to root mean square 1, with momentum behind it and a cautious mask.

    ``u = clip(g / √v)`` with a factored v; ``mu ← lerp(mu, lr u, 1 - β₁)``; ``p ← p - mask (mu + lr decay p)``. Bytes a
    parameter besides 4 (m + n) a matrix: 2 with bf16 momentum, 1 with ``"int8"``, 0.53 with ``"4bit"``, 0 with β₁ = 0.
    Source: K-Optimizers' Adakaon 0.7.4. Deviations: the mask grows no entry by more than 1,000 (1e8 there, where one of
    4,096 agreeing entries moved 6,123 lr); gradients are not changed in place; bf16 momentum is rounded at random and
    averaged in fp32; codes have no floor.

    Args:
        lr: Size of a step of one entry.
        betas: β₁ of the momentum and β₂ of the second moment, live as ``beta1`` and ``beta2``. β₁ = 0 keeps no
            momentum.
        weight_decay: Per unit of lr.
        momentum: Codec of the momentum; see `stored`.
        eps: Added to every square.
        clip_threshold: Bound on the root mean square of each parameter's direction.
        is_cautious: Whether entries that disagree with the gradient stand still, decay included.
        centralize: Whether the mean of each row of the gradient is subtracted first.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A codec is not known, or a number is out of its range.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adakaon(1e-4, momentum="int8").roles
        ('matrix', 'scalar')
    """
    beta1, beta2 = pair_of(betas)
    direction = chain(scale_by_factored_rms(beta2, eps=eps), clip_update_rms(clip_threshold))
    moved = chain(direction, average_steps(lr, beta1, weight_decay))
    whole = _descending(moved, is_cautious, centralize, "adakaon")
    return stored_as(whole, momentum) if keeps_average(beta1) else whole


def nekaon(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.5, 0.999),
    weight_decay: Number = 0.1,
    k: Number = 1.5,
    *,
    momentum: str = "4bit",
    eps: float = 1e-30,
    clip_threshold: float = 1.0,
    is_cautious: bool = True,
    centralize: bool = True,
) -> Transform:
    """`adakaon` whose gradient is taken k momenta ahead: ``y = p - clamp(k mu, ± k clip lr)``.

    y exists only inside the program. The module always holds p, so there is no mode to forget and no checkpoint of
    displaced weights. With k = 0 it is `adakaon` bit for bit. Bytes as `adakaon`.
    Source: K-Optimizers' Nekaon 0.7.4. Deviations: those of `adakaon`; the bound follows the lr of the step that takes
    the gradient, there that of the step before.

    Args:
        lr: Size of a step of one entry.
        betas: β₁ of the momentum, above 0, and β₂. Live as ``beta1`` and ``beta2``. β₁ is the dial: 0.2 for the
            smallest gap to unseen data, 0.9 for the lowest loss, says the source.
        weight_decay: Per unit of lr; acts at p.
        k: How many momenta. Live as ``look_ahead``.
        momentum: Codec of the momentum; see `stored`.
        eps: Added to every square.
        clip_threshold: Bound on the root mean square of each parameter's direction, and of the look-ahead by entry.
        is_cautious: Whether entries that disagree with the gradient stand still.
        centralize: Whether the mean of each row of the gradient is subtracted first.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: β₁ is 0, so that there is no momentum to look along; a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.nekaon(1e-4).hyperparameters["look_ahead"]
        1.5
    """
    beta1, beta2 = pair_of(betas)
    if not keeps_average(beta1):
        raise ValueError("nekaon with β₁ = 0 keeps no momentum to look along; use adakaon, or β₁ from 0.2 to 0.9.")
    direction = chain(scale_by_factored_rms(beta2, eps=eps), clip_update_rms(clip_threshold))
    moved = chain(direction, average_steps(lr, beta1, weight_decay))
    whole = _descending(moved, is_cautious, centralize, "nekaon")

    def average(state: State) -> Tensors:
        masked = state[1 if centralize else 0]
        found: Tensors = (masked.base if is_cautious else masked)[1].mu
        return found

    if keeps_average(k):
        whole = look_ahead(whole, average, declare("look_ahead", k), declare("lr", lr), clip_threshold)
    return stored_as(whole, momentum)


def autokaon(
    lr: Number = 1.0,
    betas: tuple[Number, Number] = (0.0, 0.999),
    weight_decay: Number = 0.0,
    *,
    s_init: float | None = None,
    cap: float | None = 6.0,
    freeze: int | str | None = "auto",
    scale: Number | None = None,
    momentum: str = "bf16",
    is_cautious: bool = True,
    centralize: bool = True,
) -> Transform:
    """`adakaon` whose rate `mechanic` looks for: S starts at 0.003 of the weights' root mean square, ends at 6 times.

    Once S stands still it is kept. The first weights still take 4 bytes a parameter; to free them, read
    ``step.metrics["comp/mechanic_s"]``, make another step with ``autokaon(scale=S)`` and ``warm_start`` it: the
    same steps go on, in the bytes of `adakaon`. **S often ends at its cap**; docs/optimizers.md has what we measured.
    Source: K-Optimizers' Autokaon 0.4.0, which its authors removed. Deviations: those of `adakaon`; the first update
    has S = s_init; its largest product starts at 0, there at 1e-6; memory is freed by hand.

    Args:
        lr: A shape, a schedule around 1; S scales it.
        betas: β₁ of the momentum and β₂ of the second moment, live as ``beta1`` and ``beta2``.
        weight_decay: Per unit of S lr.
        s_init: S to start from. None: 0.003 times the root mean square of all first weights.
        cap: S is at most so many times the first. None: no bound.
        freeze: As in `mechanic`.
        scale: S, if it is known. Then nothing is looked for, and no first weights are kept. Live.
        momentum: Codec of the momentum; see `stored`.
        is_cautious: Whether entries that disagree with the gradient stand still, decay included.
        centralize: Whether the mean of each row of the gradient is subtracted first.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A number is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.autokaon(freeze=500).name
        'autokaon'
    """
    base = adakaon(lr, betas, weight_decay, momentum=momentum, is_cautious=is_cautious, centralize=centralize)
    if scale is not None:
        named = declare("scale", scale)

        def scaled(updates: Tensors, params: Tensors, context: Context) -> Tensors:
            factor = context.hyperparameters[named.name]
            return {k: factor * u for k, u in updates.items()}

        return chain(base, stateless(scaled, by_name(named), "scale").with_extras(after_step=True), name="autokaon")
    whole = mechanic(
        base,
        s_init=3e-3 if s_init is None else s_init,
        relative=s_init is None,
        bounds=(0.5, math.inf if cap is None else cap),
        freeze=freeze,
    )
    return whole.with_extras(name="autokaon")


def adapnm(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.8, 0.999),
    weight_decay: Number = 0.0,
    beta0: Number = 0.5,
    *,
    momentum: str = "bf16",
    eps: float | None = None,
    clip_threshold: float = 1.0,
    is_cautious: bool = True,
    centralize: bool = True,
    factored: bool = True,
    amsgrad: bool = False,
) -> Transform:
    """AdaPNM with a factored second moment, a bound on each update and a cautious mask.

    Bytes a parameter besides 4 (m + n) a matrix: 4 with bf16 momenta, 2 with ``"int8"``, 1.06 with ``"4bit"``.
    Source: 2103.17182, K-Optimizers' AdaPNM 0.7.4. The authors' own is ``adapnm(1e-3, (0.9, 0.999), beta0=1, eps=1e-8,
    clip_threshold=inf, is_cautious=False, centralize=False, factored=False, amsgrad=True)``. Deviations: by default the
    step does not depend on the gradient's size (there it is 0.07 lr at gradients of 1e-5); those of `adakaon`.

    Args:
        lr: Size of a step of one entry.
        betas: β₁ of the two averages and β₂. Live as ``beta1`` and ``beta2``.
        weight_decay: Per unit of lr; acts outside of the mask.
        beta0: How much the gradient's noise is turned up. Live as ``pnm_beta0``.
        momentum: Codec of both averages; see `stored`.
        eps: None, or a number as in the source (1e-8); see `scale_by_adapnm`.
        clip_threshold: Bound on the root mean square of each parameter's direction.
        is_cautious: Whether entries that disagree with the gradient stand still.
        centralize: Whether the mean of each row of the gradient is subtracted first.
        factored: False keeps a second moment of every entry, 4 bytes a parameter.
        amsgrad: Whether the largest second moment so far counts, where it is kept by entry.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A codec is not known, or a number is out of its range.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adapnm(1e-3, momentum="int8").extras.stored
        {'mu': 'int8', 'mu_before': 'int8'}
    """
    direction = chain(
        scale_by_adapnm(betas, beta0, eps=eps, factored=factored, amsgrad=amsgrad), clip_update_rms(clip_threshold)
    )
    whole = chain(
        *([centralize_gradients()] if centralize else []),
        cautious(direction) if is_cautious else direction,
        correct_bias(pair_of(betas)[0]),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        name="adapnm",
    )
    codec_of("momentum", momentum)
    return whole if momentum == "fp32" else stored(whole, mu=momentum, mu_before=momentum)


def adamuon(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.95, 0.999),
    weight_decay: Number = 0.0,
    *,
    momentum: str = "bf16",
    ns_steps: int = 2,
    matmul_dtype: torch.dtype | str = "auto",
    eps: float = 1e-30,
    clip_threshold: float = 1.0,
    is_cautious: bool = True,
) -> Transform:
    """K-Optimizers' AdaMuon: momentum, Newton-Schulz, a factored second moment, a bound, 0.2 lr. Every matrix is in it,
    whatever its size; the rest gets `adakaon` with 0.2 lr.

    Bytes as `adakaon`. The authors' own AdaMuon, which orthogonalizes signs, is `adamuon_sign`.
    Source: K-Optimizers' AdaMuon 0.7.4. Deviations: those of `adakaon`. **lr** is AdamW's unit times 0.2.

    Args:
        lr: An update has root mean square 0.2 lr at most.
        betas: β₁ of the momentum and β₂ of the second moment. Live as ``beta1`` and ``beta2``.
        weight_decay: Per unit of lr.
        momentum: Codec of the momentum; see `stored`.
        ns_steps: Newton-Schulz iterations, 1 to 5.
        matmul_dtype: See `orthogonalize`.
        eps: Added to every square.
        clip_threshold: Bound on the root mean square of each parameter's direction.
        is_cautious: Whether entries that disagree with the gradient stand still, decay included.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A codec is not known, `ns_steps` is not from 1 to 5, or a number is out of its range.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adamuon(1e-3, momentum="int8").roles
        ('matrix', 'scalar')
    """
    if ns_steps not in range(1, 6):
        raise ValueError(f"ns_steps={ns_steps!r} is not a number of Newton-Schulz iterations; give 1 to 5.")
    beta1, beta2 = pair_of(betas)
    first = declare("beta1", beta1)

    def scaled() -> Transform:
        return chain(scale_by_factored_rms(beta2, eps=eps), clip_update_rms(clip_threshold))

    polar = orthogonalize(None, matmul_dtype=matmul_dtype, iterations=ns_steps)
    matrices = chain(scale_by_momentum(first), polar, scaled(), average_steps(lr, 0, weight_decay, factor=0.2))
    rest = chain(scaled(), average_steps(lr, first, weight_decay, factor=0.2))
    parts = {MATRIX: matrices, ELEMENTWISE: rest}
    whole = partition({role: _descending(part, is_cautious, False, role) for role, part in parts.items()}, "adamuon")
    return stored_as(whole, momentum)
