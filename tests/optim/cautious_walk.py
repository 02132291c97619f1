"""A descent by cautious MONA, and its twin."""

from __future__ import annotations

from collections.abc import Callable

from fusion_compile.optim import Transform, chain, scale_by_learning_rate
from fusion_compile.optim.add_cautious_weight_decay import add_cautious_weight_decay
from fusion_compile.optim.cautious import cautious
from fusion_compile.optim.scale_by_mona import scale_by_mona
from tests.oracles import protocol
from tests.oracles.cautious import Cautious, Rescale
from tests.oracles.mona import Mona


def descent(rescale: str = "mean", weight_decay: float = 0.0) -> Transform:
    return chain(
        cautious(scale_by_mona(), rescale=rescale),
        add_cautious_weight_decay(weight_decay),
        scale_by_learning_rate(0.02),
    )


def over_mona(rescale: Rescale, weight_decay: float = 0.0) -> Callable[[protocol.Tensors], Cautious]:
    return lambda p: Cautious(p, Mona(p).direction, lr=0.02, rescale=rescale, weight_decay=weight_decay)
