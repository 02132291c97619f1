"""Asynchronous copies of small device tensors to the CPU, without operators that wait implicitly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ReadBack:
    """Pinned copies of device tensors, kept between reads.

    `now` waits for one event, recorded after its copies; `later` and `arrived` never wait.
    """

    def __init__(self) -> None:
        self._copies: list[Tensor] = []
        self._event: Any = None

    def now(self, *tensors: Tensor) -> list[Tensor]:
        """`tensors` on the CPU, valid until the next read; waits for the device."""
        if all(t.device.type == "cpu" for t in tensors):
            return [t.detach() for t in tensors]
        self._send(tensors)
        if self._event is not None:
            self._event.synchronize()
        return self._copies

    def later(self, *tensors: Tensor) -> None:
        """Start to copy `tensors`, unless an earlier copy is still in flight."""
        if self._event is None or self._event.query():
            self._send(tensors)

    def arrived(self) -> list[Tensor] | None:
        """The tensors that `later` copied, or None if nothing was sent or the copy is in flight."""
        return self._copies if self._copies and (self._event is None or self._event.query()) else None

    def _send(self, tensors: tuple[Tensor, ...]) -> None:
        if [(c.shape, c.dtype) for c in self._copies] != [(t.shape, t.dtype) for t in tensors]:
            pinned = any(t.device.type == "cuda" for t in tensors)
            self._copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
        on_gpu = [t.device for t in tensors if t.device.type == "cuda"]
        if on_gpu:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(on_gpu[0]))
