"""A class of diffusers, a tiny configuration, and a call: what all specifications here are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

N = 2
"""Samples in a call."""


class Exported(NamedTuple):
    """`config`: of the class. `call`: the arguments at a time in (0, 1], random in contents, the same after a seed."""

    config: dict[str, Any]
    call: Callable[[float], dict[str, Any]]


def noise(*shape: int) -> Tensor:
    """Random numbers ``[N, *shape]``."""
    return torch.randn(N, *shape)


def thousand(t: float) -> Tensor:
    """The time in [0, 1000], one for each sample."""
    return torch.full((N,), 1000 * t)


def index(t: float) -> Tensor:
    """The time as a whole number below 1000, one for each sample."""
    return torch.full((N,), round(999 * t))


def unit(t: float) -> Tensor:
    """The time in [0, 1], one for each sample."""
    return torch.full((N,), t)


def mask(tokens: int, hidden: int = 2) -> Tensor:
    """``[N, tokens]`` int64, of which the last `hidden` are 0 in the first sample."""
    seen = torch.ones(N, tokens, dtype=torch.int64)
    seen[0, tokens - hidden :] = 0
    return seen


def grid(rows: int, columns: int, axes: int = 3) -> Tensor:
    """``[rows * columns, axes]``: positions, with the row and the column in the last two axes."""
    places = torch.zeros(rows, columns, axes)
    places[..., -2] = torch.arange(float(rows))[:, None]
    places[..., -1] = torch.arange(float(columns))
    return places.reshape(-1, axes)


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, width]``, each frequency in two columns."""
    angles = torch.arange(float(tokens))[:, None] / 10 ** torch.linspace(0, 1, width // 2)
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
