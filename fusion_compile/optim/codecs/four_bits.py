"""The codec ``"4bit"``: 15 equal steps in blocks of 128 entries, two codes a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fusion_compile.optim.codecs.codec import Codec, Parts, divisor, in_blocks, is_finite

BLOCK = 128
MOST, ZERO = 7, 8


def encode(x: Tensor, noise: Tensor | None = None) -> Parts:
    """``code = round(x / scale)``, half to even, with ``scale = max |x| / 7`` of the block, kept as code + 8.

    A block is 128 entries in a row, of a stacked bank within each of its matrices and across their rows. The first of
    two codes is the lower half of their byte. An entry that is not finite is kept as 0, and counts in no scale.
    """
    rows = x.flatten(1) if x.ndim > 1 else x
    blocks = in_blocks(rows, BLOCK)
    finite = is_finite(blocks)
    scale = torch.where(finite, blocks.abs(), torch.zeros_like(blocks)).amax(-1) / MOST
    codes = (blocks / divisor(scale)[..., None]).round().clamp(-MOST, MOST) + ZERO
    kept = torch.where(finite, codes, torch.zeros_like(codes)).to(torch.int32).flatten(-2)
    kept = kept[..., : rows.shape[-1]].reshape(x.shape)
    if x.shape[-1] % 2:
        kept = functional.pad(kept, (0, 1), value=ZERO)
    pairs = kept.reshape(*kept.shape[:-1], -1, 2)
    return {"": (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8), "scale": scale}


def decode(parts: Parts, like: Tensor) -> Tensor:
    """``(kept - 8) · scale`` in the shape of `like`; nan where the entry was not finite. Half a byte an entry and 4 for
    128.

    Error: at most max |x| / 14 of the block. An increment below that is lost: with β = 0.9 no entry under 5 / 7 of its
    block's largest decays by itself. It decays because the largest does. Sign-based updates (Lion) feel it most.
    """
    kept, scale = parts[""].to(torch.int32), parts["scale"]
    codes = torch.stack((kept & 15, kept >> 4), -1).flatten(-2)[..., : like.shape[-1]]
    rows = codes.flatten(1) if codes.ndim > 1 else codes
    each = scale[..., None].expand(*scale.shape, BLOCK).flatten(-2)[..., : rows.shape[-1]]
    found = ((rows - ZERO).to(scale.dtype) * each).reshape(codes.shape)
    return torch.where(codes == 0, torch.full_like(found, float("nan")), found)


FOUR_BITS = Codec(
    "4bit",
    BLOCK,
    encode,
    decode,
    refuses_second_moments="its 7 equal steps turn every entry under 1/14 of its block's largest into zero, and the "
    "update divides by its root; take 'int8_companded', or a factored second moment",
    rounds="half a byte and 4 for 128, to nearest",
)
