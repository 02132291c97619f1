"""What a step makes of a batch; of one like another before it, without a look at each tensor in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_compile._compat import same_kinds
from fusion_compile._step import batches

_MOST = 8
"""Kinds of batches that are remembered, as many as a step has programs by default."""


class KnownBatches:
    """Batches as a step takes them, and their signatures.

    Two batches of plain tensors that are alike one by one have one signature, and if the first one was not refused,
    nor is the second. That costs a third of a microsecond, where looking at it costs ten.

    Args:
        device: The model's.
        fixed: Whether a number counts as a constant.
        compiled: Whether what no program takes is refused.
    """

    def __init__(self, device: torch.device, *, fixed: bool, compiled: bool) -> None:
        self._device, self._fixed, self._compiled = device, fixed, compiled
        self._known: list[tuple[int, Callable[..., bool], batches.Signature]] = []

    def taken(self, given: tuple[Any, ...]) -> tuple[tuple[Any, ...], batches.Signature, bool]:
        """The batch, its signature, and whether it held arrays of numpy. Raises ValueError or TypeError for one that no
        step can take."""
        count = len(given)
        for length, is_alike, signature in self._known:
            if length == count and is_alike(*given):
                return given, signature, False
        batch, numpys = batches.taken(given, self._device)
        if self._compiled:
            batches.refuse_special(batch)
        signature = batches.signature(batch, self._device, fixed=self._fixed)
        if batch is given and self._can_be_known(batch):
            self._known.append((count, same_kinds(batch), signature))
        return batch, signature, numpys

    def _can_be_known(self, batch: tuple[Any, ...]) -> bool:
        plain = all(type(leaf) is Tensor and leaf.layout is torch.strided for leaf in batch)
        once = len({*map(id, batch)}) == len(batch)
        return bool(batch) and plain and once and len(self._known) < _MOST
