"""Scalars for a log, read from the device without ever waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fusion_compile._types import Tensors


class HasMetrics(Protocol):
    """What is logged: a `TrainingStep`, or anything with the two."""

    steps_called: int

    @property
    def metrics(self) -> Tensors: ...


class _Reading:
    """All scalars of one step as one vector on its way to the host."""

    def __init__(self, step: int, scalars: Tensors) -> None:
        self.step, self.names = step, tuple(scalars)
        packed = torch.stack(_even(scalars))
        if packed.device.type == "cuda":
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._arrived: torch.cuda.Event | None = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(packed.device))
        else:
            self._host, self._arrived = packed, None

    def here(self) -> bool:
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()

    def values(self) -> dict[str, float]:
        return dict(zip(self.names, self._host.tolist(), strict=True))


def _even(scalars: Tensors) -> list[Tensor]:
    """The scalars in one dtype, the widest of them, so that they stack."""
    dtype = torch.float32
    for t in scalars.values():
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in scalars.values()]


class ScalarLogger:
    """Writes a step's 0-dim metrics every `every` steps: one asynchronous copy, handed on when it has arrived.

        log = fc.ScalarLogger(step, SummaryWriter("runs/a").add_scalar, every=50)
        for batch in loader:
            step(*batch)
            log()
        log.close()

    `write`: called as ``write(name, value, step)`` with the signature of TensorBoard's ``SummaryWriter.add_scalar``.
    On a GPU a value is written at the first call after its copy has arrived, usually the next step; `close` waits for
    what is still on its way. Metrics that are not 0-dim are left out.
    """

    def __init__(
        self, step: HasMetrics, write: Callable[[str, float, int], object], *, every: int = 50, prefix: str = ""
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is not a number of steps; give a whole number, at least 1.")
        self._step, self._write, self._every, self._prefix = step, write, every, prefix
        self._on_their_way: deque[_Reading] = deque()

    def __call__(self) -> None:
        """After each step. Never waits for the device."""
        if self._step.steps_called % self._every == 0:
            scalars = {name: t for name, t in self._step.metrics.items() if t.ndim == 0}
            self._on_their_way.append(_Reading(self._step.steps_called, scalars))
        while self._on_their_way and self._on_their_way[0].here():
            self._hand_on(self._on_their_way.popleft())

    def close(self) -> None:
        """Wait for what is on its way and write it."""
        while self._on_their_way:
            reading = self._on_their_way.popleft()
            reading.wait()
            self._hand_on(reading)

    def _hand_on(self, reading: _Reading) -> None:
        for name, value in reading.values().items():
            self._write(f"{self._prefix}{name}", value, reading.step)
