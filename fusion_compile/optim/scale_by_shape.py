"""The factor that makes one learning rate fit matrices of every shape."""

from __future__ import annotations

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Transform, stateless
from fusion_compile.optim.matrix.newton_schulz import shape_factor

ADJUSTMENTS = ("original", "match_rms_adamw", "none")


def scale_by_shape(adjust_lr: str = "original") -> Transform:
    """Multiply ``[..., r, c]`` by √max(1, r/c) (``"original"``), 0.2 √max(r, c) (``"match_rms_adamw"``) or 1
    (``"none"``)."""
    if adjust_lr not in ADJUSTMENTS:
        raise ValueError(f"adjust_lr={adjust_lr!r} is not known; use one of {', '.join(map(repr, ADJUSTMENTS))}.")

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        return {k: u * shape_factor(u, adjust_lr) for k, u in updates.items()}

    return stateless(update, {}, "scale_by_shape")
