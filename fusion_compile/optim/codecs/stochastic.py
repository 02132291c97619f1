"""Rounding to bf16 at random: the probability of rounding up is the share of the way, so the mean is the number."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile.optim.codecs.codec import is_finite

_LOWER = 0xFFFF


def stochastic_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """`x` (fp32; fp64 is rounded to that first) in bf16. `noise`: whole numbers from 0 to 65,535 in the shape of `x`.

    The noise is added to the 16 bits that are lost, and they are cut off. A number that bf16 holds stays what it is.
    Infinity and nan stay what they are.
    """
    x = x.to(torch.float32)
    bits = (x.view(torch.int32) + noise.to(torch.int32)) & ~_LOWER
    return torch.where(is_finite(x), bits.view(torch.float32), x).to(torch.bfloat16)
