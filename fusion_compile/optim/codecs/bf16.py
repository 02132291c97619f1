"""The codec ``"bf16"``: the upper half of an fp32 number, rounded at random."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile.optim.codecs.codec import Codec, Parts
from fusion_compile.optim.codecs.stochastic import stochastic_bf16


def encode(x: Tensor, noise: Tensor | None = None) -> Parts:
    """bf16, up or down at random; to nearest without `noise`."""
    return {"": x.to(torch.bfloat16) if noise is None else stochastic_bf16(x, noise)}


def decode(parts: Parts, like: Tensor) -> Tensor:
    """The numbers in the dtype of `like`. 2 bytes an entry.

    Error: below one unit in the last place, 2⁻⁷ of the number; its mean is 0. Every increment is held in the mean, so a
    slow average does not stall. Rounded to nearest, one with β of 0.999 would stand still: its increments are a
    thousandth, and bf16's steps 2⁻⁸ to 2⁻⁷.
    """
    return parts[""].to(like.dtype)


BF16 = Codec("bf16", 1, encode, decode, draws=True, rounds="2 bytes, rounded at random")
