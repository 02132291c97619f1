"""torch's settings of the process and the thread that decide what a captured program computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import torch

Reader = Callable[[], Any]

_AT_ONCE = 4
"""About 1 µs each."""


def _readers_of(devices: list[str]) -> dict[str, Reader]:
    readers: dict[str, Reader] = {
        "torch.is_grad_enabled()": torch.is_grad_enabled,
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled,
        "torch.get_default_dtype()": torch.get_default_dtype,
    }
    for device in devices:
        readers[f"torch.is_autocast_enabled({device!r})"] = partial(torch.is_autocast_enabled, device)
        readers[f"torch.get_autocast_dtype({device!r})"] = partial(torch.get_autocast_dtype, device)
    return readers


def _devices() -> list[str]:
    """The CPU, and the accelerator if there is one. Does not initialize it."""
    current = torch.accelerator.current_accelerator()
    return ["cpu"] + ([] if current is None else [current.type])


_CALLS = (
    "torch.are_deterministic_algorithms_enabled",
    "torch.get_float32_matmul_precision",
    "torch.backends.cuda.flash_sdp_enabled",
    "torch.backends.cuda.mem_efficient_sdp_enabled",
    "torch.backends.cuda.math_sdp_enabled",
    "torch.backends.cuda.cudnn_sdp_enabled",
)
_FLAGS = (
    "torch.backends.cuda.matmul.allow_tf32",
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "torch.backends.cudnn.allow_tf32",
    "torch.backends.cudnn.deterministic",
    "torch.backends.cudnn.enabled",
    "torch.backends.mkldnn.enabled",
    "torch.backends.mkldnn.matmul.fp32_precision",
    "torch.backends.cuda.matmul.fp32_precision",
    "torch.backends.cudnn.conv.fp32_precision",
)


def _called(function: attrgetter[Reader]) -> Any:
    return function(torch)()


def _or_unreadable(reader: Reader) -> Any:
    """torch refuses to read an old TF32 flag after a new one was written; that is a setting too."""
    try:
        return reader()
    except (RuntimeError, AttributeError, AssertionError):
        return "unreadable"


class TorchSettings:
    """`fast`: gradients, default dtype and autocast, which people change around single calls. `slow`: algorithms and
    precisions, which people set once. Each: name -> a function that reads it. Both are empty unless `compared`."""

    def __init__(self, *, compared: bool = True) -> None:
        self.fast = _readers_of(_devices()) if compared else {}
        paths = {path: attrgetter(path.removeprefix("torch.")) for path in (*_CALLS, *_FLAGS)}
        slow: dict[str, Reader] = {f"{path}()": partial(_called, paths[path]) for path in _CALLS}
        slow |= {path: partial(paths[path], torch) for path in _FLAGS}
        self.slow = {n: reader for n, reader in slow.items() if compared and _or_unreadable(reader) != "unreadable"}
        self._fast = list(self.fast.values())

    def read_fast(self) -> list[Any]:
        """The values of `fast`, in order."""
        return [reader() for reader in self._fast]

    def slow_lots(self) -> list[dict[str, Reader]]:
        """`slow` in lots small enough to read one at each call."""
        items = list(self.slow.items())
        return [dict(items[i : i + _AT_ONCE]) for i in range(0, len(items), _AT_ONCE)]


class SlowSettings:
    """Some settings, and their values when this was made. A value that torch refuses to read is ``"unreadable"``."""

    def __init__(self, readers: dict[str, Reader]) -> None:
        self._readers = readers
        self._values = self._now()

    def is_as_it_was(self) -> bool:
        """Whether every setting has its value."""
        return self._now() == self._values

    def differences(self) -> Iterator[tuple[str, Any, Any]]:
        """``(name, before, now)``."""
        for name, before, now in zip(self._readers, self._values, self._now(), strict=True):
            if before != now:
                yield name, before, now

    def _now(self) -> list[Any]:
        return [_or_unreadable(reader) for reader in self._readers.values()]
