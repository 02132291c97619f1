"""The codec ``"int8"``: 255 equal steps between the largest entry of a row and its negative."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile.optim.codecs.codec import Codec, Parts, divisor, is_finite, largest, spread

BLOCK = 512
MOST, NOT_FINITE = 127, -128


def encode(x: Tensor, noise: Tensor | None = None) -> Parts:
    """``code = round(x / scale)``, half to even, with ``scale = max |x| / 127`` of the row.

    A row is the last axis of a stacked bank (of a convolution: all axes but the first), and 512 entries of a flat one.
    An entry that is not finite has the code -128 and counts in no scale.
    """
    scale = largest(x, BLOCK) / MOST
    codes = (x / divisor(spread(scale, x, BLOCK))).round().clamp(-MOST, MOST)
    return {"": torch.where(is_finite(x), codes, NOT_FINITE).to(torch.int8), "scale": scale}


def decode(parts: Parts, like: Tensor) -> Tensor:
    """``code · scale``; nan where the entry was not finite. 1 byte an entry and 4 a row.

    Error: at most max |x| / 254 of the row. An increment below that is lost: with β = 0.9 an entry under 5 / 127 of its
    row's largest does not decay to zero, with β = 0.99 one under 50 / 127. What is lost is not made up for, so keep
    averages in it that move by more, and whose small entries may be wrong: momenta.
    """
    codes = parts[""]
    found = codes.to(parts["scale"].dtype) * spread(parts["scale"], codes, BLOCK)
    return torch.where(codes == NOT_FINITE, torch.full_like(found, float("nan")), found)


INT8 = Codec(
    "int8",
    BLOCK,
    encode,
    decode,
    refuses_second_moments="its 127 equal steps turn every entry under 1/254 of its row's largest into zero, that is, "
    "every gradient under 1/16 of the largest, and the update divides by its root; take 'int8_companded'",
    rounds="1 byte and 4 a row, to nearest",
)
