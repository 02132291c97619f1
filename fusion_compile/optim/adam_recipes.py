"""Recipes of Adam's relatives: ADOPT, AdaBelief and AdamP, each with the defaults of its authors' code."""

from __future__ import annotations

from fusion_compile.optim._combine import chain
from fusion_compile.optim._transform import Number, Transform
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.scale_by_adabelief import scale_by_adabelief
from fusion_compile.optim.scale_by_adamp import scale_by_adamp
from fusion_compile.optim.scale_by_adopt import scale_by_adopt
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.stored import stored_as


def adopt(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.9999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    *,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """ADOPT for every parameter: Adam that normalizes before it averages. 8 bytes a parameter, fewer with codecs.

    The first update moves nothing but by the decay. Source: 2411.02853 and its code (``ADOPT(decouple=True)``).
    Deviations: none.

    Args:
        lr: Size of a step of one entry.
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Lower bound on the root of the second moment.
        weight_decay: Per unit of lr.
        momentum: Codec of the first moment; see `stored`.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for parameters of any shape.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A number is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adopt(1e-3, momentum="int8").extras.stored
        {'mu': 'int8'}
    """
    decay, rate = add_decayed_weights(weight_decay), scale_by_learning_rate(lr)
    return stored_as(chain(scale_by_adopt(betas, eps), decay, rate, name="adopt"), momentum, second_moment)


def adabelief(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-16,
    weight_decay: Number = 0.0,
    *,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """AdaBelief for every parameter: steps are long where gradients agree with their average. 8 bytes a parameter.

    Source: 2010.07468 and its code (``AdaBelief(weight_decouple=True, rectify=False)``). Deviations: none.

    Args:
        lr: Size of a step of one entry.
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Added to the second moment at each update, and to its root.
        weight_decay: Per unit of lr.
        momentum: Codec of the first moment; see `stored`.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for parameters of any shape.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A number is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adabelief(1e-3, weight_decay=0.01).name
        'adabelief'
    """
    decay, rate = add_decayed_weights(weight_decay), scale_by_learning_rate(lr)
    return stored_as(chain(scale_by_adabelief(betas, eps), decay, rate, name="adabelief"), momentum, second_moment)


def adamp(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    delta: float = 0.1,
    decay_ratio: float = 0.1,
    momentum: str = "fp32",
    second_moment: str = "fp32",
) -> Transform:
    """AdamP: Adam without the part that only makes scale-invariant weights grow. 8 bytes a parameter.

    Source: 2006.08217, clovaai/AdamP. Deviations: none.

    Args:
        lr: Size of a step of one entry.
        betas: Decay of the two moments. Live as ``beta1`` and ``beta2``.
        eps: Added to the root of the second moment.
        weight_decay: Per unit of lr.
        delta: How near to orthogonal gradient and weights must be; see `scale_by_adamp`.
        decay_ratio: Factor on the decay where the update was projected (``wd_ratio`` there).
        momentum: Codec of the first moment; see `stored`.
        second_moment: Codec of the second moment; ``"int8"`` means ``"int8_companded"``.

    Returns:
        A complete optimizer for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        TypeError: `betas` is not a pair.
        ValueError: A number is out of its range, or a codec is not known.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adamp(1e-3, weight_decay=0.01).roles
        ('matrix', 'scalar')
    """
    direction = scale_by_adamp(betas, eps, weight_decay, delta=delta, decay_ratio=decay_ratio)
    return stored_as(chain(direction, scale_by_learning_rate(lr), name="adamp"), momentum, second_moment)
