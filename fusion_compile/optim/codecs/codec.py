"""What every codec is: two pure functions on banks, and what may be kept in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Parts: TypeAlias = dict[str, Tensor]
"""What is kept of one tensor, by suffix: ``{"": codes, "scale": scales}``."""


class Codec(NamedTuple):
    """How tensors of one field are kept.

    A bank is flat, ``[N]``, or stacked, ``[K, …]``. Codes lie as the entries do, so that each parameter's are its own.

    Attributes:
        name: What users write.
        block: Entries of a flat bank that share a scale. Every parameter starts at a multiple of it, so no block holds
            two parameters. 1 where nothing is shared.
        encode: ``(tensor, noise) -> parts``. `noise`: whole numbers from 0 to 65,535 in the tensor's shape, where
            `draws`; None rounds to nearest.
        decode: ``(parts, like) -> tensor`` of the dtype and, where the codes do not tell, of the shape of `like`.
        draws: Whether codes are drawn: rounded up or down at random, so that the mean is the number itself.
        refuses_second_moments: Why no second moment may be kept in it; empty where it may.
        rounds: What it does to numbers, in a few words, for reports.
    """

    name: str
    block: int
    encode: Callable[[Tensor, Tensor | None], Parts]
    decode: Callable[[Parts, Tensor], Tensor]
    draws: bool = False
    refuses_second_moments: str = ""
    rounds: str = ""


def is_finite(x: Tensor) -> Tensor:
    """Which entries are finite. A comparison, which Inductor vectorizes on a CPU; `isfinite` it does not."""
    return x.abs() <= torch.finfo(x.dtype).max


def largest(x: Tensor, block: int) -> Tensor:
    """The largest finite size in each row: the last axis of a stacked bank that is longer than 1 (kept, with length 1),
    blocks of a flat one."""
    sizes = torch.where(is_finite(x), x.abs(), torch.zeros_like(x))
    if x.ndim == 1:
        return in_blocks(sizes, block).amax(-1)
    return sizes.amax(-2 if x.ndim > 2 and x.shape[-1] == 1 else -1, keepdim=True)


def in_blocks(flat: Tensor, block: int) -> Tensor:
    """The last axis cut into rows of `block` entries, the last one filled with zeros."""
    lacking = -flat.shape[-1] % block
    filled = functional.pad(flat, (0, lacking)) if lacking else flat
    return filled.reshape(*flat.shape[:-1], -1, block)


def spread(of_blocks: Tensor, like: Tensor, block: int) -> Tensor:
    """One number a row or block, as `largest` gives them, for every entry of a bank like `like`."""
    if like.ndim > 1:
        return of_blocks
    return of_blocks[:, None].expand(-1, block).reshape(-1)[: like.shape[0]]


def divisor(scale: Tensor) -> Tensor:
    """`scale`, or 1 where it is 0: a row of zeros has codes of zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
