"""A compiled region gives its results in the strides in which they were traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TracedStrides:
    """`compiled`, with each result in the strides of `traced`.

    Views of results, and the regions that read them, are compiled for these strides. A compiler keeps those of its own
    trace, in which a decomposed operator may lay out its result in another way. Which results that are is known after
    the first call: the strides of a compiled program never change.
    """

    def __init__(self, compiled: Callable[[list[Any]], Sequence[Tensor]], traced: Sequence[Tensor]) -> None:
        self._compiled, self._traced = compiled, [(tuple(t.shape), t.stride()) for t in traced]
        self._others: list[int] | None = None

    def __call__(self, given: list[Any]) -> Sequence[Tensor]:
        """Run on `given`, a list that is emptied."""
        results = self._compiled(given)
        if self._others is None:
            self._others = [i for i, t in enumerate(results) if not _lies_as(t, *self._traced[i])]
        if self._others:
            results = list(results)
            for i in self._others:
                shape, stride = self._traced[i]
                own = results[i]
                results[i] = torch.empty_strided(shape, stride, dtype=own.dtype, device=own.device).copy_(own)
        return results


def _lies_as(tensor: Tensor, shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether `tensor` has these strides where they mean something."""
    return all(n == 1 or a == b for n, a, b in zip(shape, tensor.stride(), stride, strict=True))
