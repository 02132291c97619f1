"""The factor that makes one learning rate fit matrices of every shape."""

from __future__ import annotations

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import BankInfos, Context, Transform, stateless
from fusion_compile.optim.matrix.blocks import in_blocks

SCALES = ("original", "match_rms_adamw", "none")


def scale_by_shape(scale: str = "original", *, sqrt_blocks: bool = False) -> Transform:
    """Multiply matrices ``[..., r, c]`` by a factor of their shape; see `shape_factor`.

    In a bank with blocks every block gets the factor of its own shape. Keeps nothing.
    Source: ``torch.optim.Muon`` (``adjust_lr_fn``), 2502.16982; `sqrt_blocks` is CMuon's optional scale (2608.02502;
    known from a reading note, the paper itself was not readable). Deviations: none.

    Args:
        scale: ``"original"``: √max(1, r/c); ``"match_rms_adamw"``: 0.2 √max(r, c); ``"none"``: 1.
        sqrt_blocks: Multiply by √(number of blocks), too.

    Returns:
        A transform without a step. After an orthogonalization the unit of lr is spectral norm per step
        (``"original"``) or AdamW's (``"match_rms_adamw"``).

    Raises:
        ValueError: `scale` is not one of the three.

    Example:
        >>> from fusion_compile import optim
        >>> muon_direction = optim.chain(optim.orthogonalize(0.95), optim.scale_by_shape("match_rms_adamw"))
        >>> muon_direction.name
        'chain(orthogonalize, scale_by_shape)'
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; use one of {', '.join(map(repr, SCALES))}.")

    def built(infos: BankInfos) -> Transform:
        blocks = {key: info.blocks for key, info in infos.items()}

        def scaled(key: str, u: Tensor) -> Tensor:
            cut = blocks.get(key)
            extra = len(cut.sizes) ** 0.5 if sqrt_blocks and cut is not None else 1.0
            return in_blocks(lambda b: (b * (shape_factor(b, scale) * extra),), cut, u)[0]

        def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
            return {k: scaled(k, u) for k, u in updates.items()}

        return stateless(update, {}, "scale_by_shape").with_extras(bind=built, after_step=True)

    return built({})


def shape_factor(x: Tensor, scale: str) -> float:
    """Factor on lr from the shape ``[..., r, c]``.

    ``"original"``: √max(1, r/c), lr in units of spectral norm per step; ``"match_rms_adamw"``: 0.2 √max(r, c), so that
    the update's root mean square is 0.2 lr, the size of an AdamW update at that lr (2502.16982); ``"none"``: 1.
    """
    r, c = x.shape[-2:]
    if scale == "original":
        return float(max(1.0, r / c) ** 0.5)
    if scale == "match_rms_adamw":
        return float(0.2 * max(r, c) ** 0.5)
    return 1.0
