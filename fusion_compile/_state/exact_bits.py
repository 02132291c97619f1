"""An fp32 number as a bf16 number that people see and the 16 bits that its rounding lost: together every bit again.

Rounding is to nearest, and away from zero from the middle on. To even, as torch rounds, would not do: a bf16 number
that is even is then the rounding of 65,537 fp32 numbers, one more than 16 bits can tell apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF, _LOWER, _SIGNLESS = 0x8000, 0xFFFF, 0x7FFFFFFF
_INFINITY = 0x7F800000


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """``(shown, lost)``: bf16 and int16 in the shape of `master`, fp32.

    Every finite number and infinity comes back from `join` bit for bit, and every nan as a nan: those whose upper 17
    bits but the sign are ones would round to zero, and lose the last of these.
    """
    bits = master.view(torch.int32)
    odd = ((bits & _SIGNLESS) > _INFINITY) & ((bits & _SIGNLESS) >= 0x7FFF8000)
    bits = torch.where(odd, bits & ~_HALF, bits)
    shown = ((bits + _HALF) >> 16).to(torch.int16).view(torch.bfloat16)
    lost = (((bits & _LOWER) ^ _HALF) - _HALF).to(torch.int16)
    return shown, lost


def join(shown: Tensor, lost: Tensor) -> Tensor:
    """The fp32 number that `split` took apart.

    Where somebody wrote `shown` since, the number is within half a step of what was written, and zero stays near zero.
    """
    upper = shown.view(torch.int16).to(torch.int32)
    lower = lost.to(torch.int32) & _LOWER
    up = (lower >= _HALF) & ((upper & 0x7FFF) != 0)  # nothing is rounded up to zero
    return ((upper - up.to(torch.int32)) * 0x10000 + lower).view(torch.float32)
