"""The codec ``"int8_companded"``: 255 steps that are fine near zero, for second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile.optim.codecs.codec import Codec, Parts, divisor, is_finite, largest, spread
from fusion_compile.optim.codecs.int8 import BLOCK, MOST, NOT_FINITE


def encode(x: Tensor, noise: Tensor | None = None) -> Parts:
    """The number ``sign(code) (|code| / 127)⁴ max |x|`` above or below, at random so that the mean is `x`; the nearer
    of the two without `noise`.

    A row is that of ``"int8"``. What is not zero is never rounded to zero, because an update divides by it.
    """
    top = largest(x, BLOCK)
    share = (x.abs() / divisor(spread(top, x, BLOCK))).clamp(max=1)
    below = (share.sqrt().sqrt() * MOST).floor().clamp(max=MOST - 1)
    low, high = _level(below), _level(below + 1)
    drawn = 0.5 if noise is None else (noise.to(x.dtype) + 0.5) / 65536
    codes = below + ((share - low) / (high - low) > drawn).to(x.dtype)
    codes = codes.clamp(min=1) * x.sign()
    return {"": torch.where(is_finite(x), codes, NOT_FINITE).to(torch.int8), "scale": top}


def decode(parts: Parts, like: Tensor) -> Tensor:
    """The numbers; nan where the entry was not finite. 1 byte an entry and 4 a row.

    Error: below the gap between two levels, 4 / 127 of the row's largest near it and ``4 x / |code|`` elsewhere; its
    mean is 0 down to 127⁻⁴ = 3.8e-9 of the row's largest, and what is smaller and not zero is kept as that. Every
    increment above is held in the mean, so a slow average (β₂ = 0.999) does not stall.
    """
    codes = parts[""]
    signed = codes.to(parts["scale"].dtype)
    found = signed.sign() * _level(signed.abs()) * spread(parts["scale"], codes, BLOCK)
    return torch.where(codes == NOT_FINITE, torch.full_like(found, float("nan")), found)


def _level(code: Tensor) -> Tensor:
    square = (code / MOST) * (code / MOST)
    return square * square


INT8_COMPANDED = Codec(
    "int8_companded", BLOCK, encode, decode, draws=True, rounds="1 byte and 4 a row, fine near zero, at random"
)
