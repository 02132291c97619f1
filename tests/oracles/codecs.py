"""Codecs in float64, entry by entry: what is remembered of a row of numbers.

int8            round(x / s) s,             s = max |x| / 127, half to even
4bit            the same with 7, in blocks of 128
int8_companded  one of the two numbers sign(c) (|c| / 127)^4 max |x| around x, never 0 unless x is
bf16            one of the two numbers with 8 bits around x
"""

import numpy as np

from tests.oracles.protocol import Array


def rows(x: Array, block: int) -> list[Array]:
    """The rows of a matrix or stack along its last axis, or the blocks of a vector."""
    if x.ndim == 1:
        return [x[at : at + block] for at in range(0, x.size, block)]
    return list(x.reshape(-1, x.shape[-1]))


def linear(row: Array, levels: int) -> Array:
    """What a linear codec with so many levels a side remembers of one row."""
    scale = np.abs(row).max() / levels
    return np.rint(row / scale) * scale if scale > 0 else np.zeros_like(row)


def int8(x: Array) -> Array:
    return np.concatenate([linear(row, 127) for row in rows(x, 512)]).reshape(x.shape)


def four_bits(x: Array) -> Array:
    matrices = [x] if x.ndim == 1 else [m.reshape(-1) for m in x]
    done = [np.concatenate([linear(block, 7) for block in rows(m, 128)]) for m in matrices]
    return np.stack(done).reshape(x.shape)


def companded_levels(row: Array) -> tuple[Array, Array]:
    """The two neighbours, by size, between which every entry of a row lies."""
    top = np.abs(row).max()
    levels = (np.arange(128) / 127) ** 4 * top
    at = np.clip(np.searchsorted(levels, np.abs(row), side="right") - 1, 0, 126)
    return np.sign(row) * levels[at], np.sign(row) * levels[at + 1]


def bf16_neighbours(x: Array) -> tuple[Array, Array]:
    """The numbers of bf16 next to `x` towards zero and away from it."""
    exponent = np.floor(np.log2(np.abs(x), where=x != 0, out=np.zeros_like(x)))
    step = 2.0 ** (exponent - 7)
    below = np.floor(np.abs(x) / step) * step
    return np.sign(x) * below, np.sign(x) * np.where(below == np.abs(x), below, below + step)
