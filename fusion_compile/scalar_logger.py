"""Numbers for a log, read from the device without ever waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fusion_compile._types import Tensors


class HasMetrics(Protocol):
    """A `TrainingStep`, or anything else with these two."""

    steps_called: int

    @property
    def metrics(self) -> Tensors: ...


class _Reading:
    """All scalars and vectors of one step as one vector on its way to the CPU."""

    def __init__(self, step: int, metrics: Tensors) -> None:
        self.step, self.lengths = step, {name: len(t) if t.ndim else None for name, t in metrics.items()}
        packed = torch.cat(_even(metrics))
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

    def values(self) -> dict[str, float | list[float]]:
        numbers = iter(self._host.tolist())
        return {n: next(numbers) if k is None else [next(numbers) for _ in range(k)] for n, k in self.lengths.items()}


def _even(metrics: Tensors) -> list[Tensor]:
    """Scalars and vectors as vectors of the widest of their dtypes, which can be joined."""
    dtype = torch.float32
    for t in metrics.values():
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype).reshape(-1) for t in metrics.values()]


class ScalarLogger:
    """Write a step's metrics of no axis or one every `every` steps, without ever waiting for the device.

    Call it after each step and `close` at the end. One asynchronous copy brings all of them to the CPU. On a GPU they
    are written at the first call after the copy arrived, usually at the next step. Metrics of more axes are left out.

    Args:
        step: The training step whose metrics are logged.
        write: Called as ``write(name, value, step)``, the signature of TensorBoard's ``SummaryWriter.add_scalar``. For
            W&B: ``lambda name, value, step: run.log({name: value}, step=step)``.
        vectors: Called as ``vectors(name, values, step)`` with the list of a vector's entries (the loss by timestep
            bucket). None: `write` gets each as ``<name>/<index>``, a curve for each entry.
        every: Steps between two logged ones, at least 1.
        prefix: Put before every name.

    Raises:
        ValueError: `every` is less than 1.

    Example:
        >>> import torch, fusion_compile as fc
        >>> step = fc.compile_training_step(torch.nn.Linear(4, 2), lambda m, x: m(x).square().mean(), mode="eager")
        >>> rows = []
        >>> log = fc.ScalarLogger(step, lambda name, value, step: rows.append((name, step)), every=2, prefix="train/")
        >>> for _ in range(4):
        ...     loss = step(torch.randn(8, 4))
        ...     log()
        >>> log.close()
        >>> [row for row in rows if row[0] == "train/loss"]
        [('train/loss', 2), ('train/loss', 4)]
    """

    def __init__(
        self,
        step: HasMetrics,
        write: Callable[[str, float, int], object],
        *,
        vectors: Callable[[str, list[float], int], object] | None = None,
        every: int = 50,
        prefix: str = "",
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is not a number of steps; give a whole number, at least 1.")
        self._step, self._write, self._every, self._prefix = step, write, every, prefix
        self._vectors = vectors
        self._on_their_way: deque[_Reading] = deque()

    def __call__(self) -> None:
        """Start a copy if this step is logged, and write what has arrived. Call it after each step."""
        if self._step.steps_called % self._every == 0:
            metrics = {name: t for name, t in self._step.metrics.items() if t.ndim < 2}
            self._on_their_way.append(_Reading(self._step.steps_called, metrics))
        while self._on_their_way and self._on_their_way[0].here():
            self._hand_on(self._on_their_way.popleft())

    def close(self) -> None:
        """Wait for the copies on their way and write them."""
        while self._on_their_way:
            reading = self._on_their_way.popleft()
            reading.wait()
            self._hand_on(reading)

    def _hand_on(self, reading: _Reading) -> None:
        for name, value in reading.values().items():
            if not isinstance(value, list):
                self._write(f"{self._prefix}{name}", value, reading.step)
            elif self._vectors is not None:
                self._vectors(f"{self._prefix}{name}", value, reading.step)
            else:
                for at, entry in enumerate(value):
                    self._write(f"{self._prefix}{name}/{at}", entry, reading.step)
