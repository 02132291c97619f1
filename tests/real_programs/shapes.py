"""Rows: sizes that change from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convolutional_denoiser import Convolutional, noise
from tests.real_programs.program import Program, Sampling, Training

Size = tuple[int, int, int, int]
"""Samples, rows, columns, tokens of text."""

SAME: list[Size] = [(4, 8, 8, 3)] * 3
LAST_SMALLER: list[Size] = [*SAME, (3, 8, 8, 3)]
BUCKETS: list[Size] = [(4, 8, 8, 3), (4, 6, 10, 3), (4, 10, 6, 3), (4, 8, 8, 3), (4, 6, 10, 3), (4, 4, 12, 3)]
TEXTS: list[Size] = [(4, 8, 8, n) for n in (3, 5, 7, 2)]
BATCHES: list[Size] = [(n, 8, 8, 3) for n in (4, 2, 6, 3)]
MANY: list[Size] = [(2, 8, 8, n) for n in (3, 4, 5)]


def _denoise(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return F.mse_loss(model(x, t, text), x)


def _rows(sizes: Sequence[Size], **options: Any) -> Program:
    def train() -> Training:
        return Training(Convolutional(), _denoise, [noise(*size) for size in sizes], options)

    def sample() -> Sampling:
        calls = []
        for size in sizes:
            x, _, text = noise(*size)
            calls += [{"x": x, "t": torch.full((size[0],), t), "text": text} for t in (0.9, 0.4)]
        return Sampling(Convolutional().eval().requires_grad_(False), calls)

    if options:
        return Program(train, without=("facade",))
    return Program(train, sample)


PROGRAMS: dict[str, Program] = {
    "one size": _rows(SAME),
    "a last batch that is smaller": _rows(LAST_SMALLER),
    "a last batch that is smaller, dynamic=True": _rows(LAST_SMALLER, dynamic=True),
    "aspect-ratio buckets": _rows(BUCKETS),
    "aspect-ratio buckets, dynamic=True": _rows(BUCKETS, dynamic=True),
    "texts of any length": _rows(TEXTS),
    "texts of any length, dynamic=True": _rows(TEXTS, dynamic=True),
    "another batch size": _rows(BATCHES),
    "more sizes than max_shapes": _rows(MANY, max_shapes=2),
    "micro-batches that do not divide": _rows([(4, 8, 8, 3), (3, 8, 8, 3)], accumulate=2),
}
