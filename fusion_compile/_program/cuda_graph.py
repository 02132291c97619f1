"""A function of tensors as one CUDA graph: recorded at its first call, replayed at every later one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fusion_compile.passes import find_host_syncs

Record = Callable[[Callable[..., Sequence[Tensor]], Sequence[Tensor]], tuple[Callable[[], Any], Sequence[Tensor]]]

_log = logging.getLogger(__name__)  # `explain` listens, and knows Inductor's words for it

_WARM_UP = 2
"""Calls before the recorded one: the first compiles and tunes, the second runs as every later one will."""


def why_not_captured(graph_module: fx.GraphModule, tensors: Iterable[Tensor]) -> str | None:
    """Why a CUDA graph cannot hold `graph_module`, which reads `tensors`; None if it can."""
    if findings := find_host_syncs(graph_module):
        return str(findings[0])
    places = sorted({str(t.device) for t in tensors})
    return f"it reads tensors on {' and '.join(places)}." if len(places) > 1 else None


class Replay:
    """`fn`, whose tensors are all on one GPU, as one CUDA graph.

    `fn` must return tensors of its own memory, must not wait for the GPU, and takes inputs of the same shapes at every
    call. `fixed()`: the tensors that it reads besides its inputs; when one of them has moved, `fn` is recorded again.
    Inside the recording of another graph `fn` is simply called. The GPU memory that `fn` allocates stays reserved for
    the replays.

    Raises RuntimeError if `fn` cannot be recorded.
    """

    def __init__(
        self,
        fn: Callable[..., Sequence[Tensor]],
        fixed: Callable[[], Iterable[Tensor]],
        record: Record | None = None,
    ) -> None:
        self._fn, self._fixed, self._record = fn, fixed, record or record_on_gpu
        self._addresses: tuple[int, ...] = ()
        self._inputs: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *given: Tensor) -> list[Tensor]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return list(self._fn(*given))
        addresses = tuple(t.data_ptr() for t in self._fixed())
        if self._replay is None or addresses != self._addresses:
            if self._replay is None:
                _log.debug("Recording function=the loop's body")
            else:
                moved = sum(a != b for a, b in zip(addresses, self._addresses, strict=True))
                _log.debug("Re-recording function=the loop's body, reason=pointer changed of %d weights", moved)
            self._replay, self._outputs = None, ()  # gives the memory of the old recording to the new one
            self._inputs = [torch.empty_like(t).copy_(t) for t in given]
            self._replay, self._outputs = self._record(self._fn, self._inputs)
            self._addresses = addresses
        for own, tensor in zip(self._inputs, given, strict=True):
            own.copy_(tensor)
        self._replay()
        return [t.clone() for t in self._outputs]


def record_on_gpu(
    fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[Callable[[], Any], Sequence[Tensor]]:
    """``(replay, outputs)``: `replay` writes into `outputs` what `fn` returns for the present values of `inputs`."""
    device = inputs[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                fn(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local: another thread that pins memory or asks for the device must not spoil the recording.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = fn(*inputs)
        except RuntimeError as error:
            raise RuntimeError(
                f"the loop's body could not be recorded as a CUDA graph: {error}. Compile it without one: "
                f"mode='max-autotune-no-cudagraphs'."
            ) from error

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, outputs
