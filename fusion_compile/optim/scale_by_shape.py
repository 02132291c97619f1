"""The factor that makes one learning rate fit matrices of every shape."""

from __future__ import annotations

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Facts, Transform, stateless
from fusion_compile.optim.matrix.blocks import in_blocks
from fusion_compile.optim.matrix.newton_schulz import shape_factor

ADJUSTMENTS = ("original", "match_rms_adamw", "none")


def scale_by_shape(adjust_lr: str = "original", *, sqrt_blocks: bool = False) -> Transform:
    """Multiply ``[..., r, c]`` by √max(1, r/c) (``"original"``), 0.2 √max(r, c) (``"match_rms_adamw"``) or 1
    (``"none"``).

    Of a bank with blocks every block gets the factor of its own shape; with `sqrt_blocks` times √(number of blocks),
    CMuon's optional scale (2608.02502; known from a reading note, the paper itself was not readable).
    """
    if adjust_lr not in ADJUSTMENTS:
        raise ValueError(f"adjust_lr={adjust_lr!r} is not known; use one of {', '.join(map(repr, ADJUSTMENTS))}.")

    def built(facts: Facts) -> Transform:
        blocks = {key: bank.blocks for key, bank in facts.items()}

        def scaled(key: str, u: Tensor) -> Tensor:
            cut = blocks.get(key)
            extra = len(cut.sizes) ** 0.5 if sqrt_blocks and cut is not None else 1.0
            return in_blocks(lambda b: (b * (shape_factor(b, adjust_lr) * extra),), cut, u)[0]

        def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
            return {k: scaled(k, u) for k, u in updates.items()}

        return stateless(update, {}, "scale_by_shape")._replace(bind=built)

    return built({})
