"""Real memory that a run on tensors without data writes all the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_compile._capture.rehearsal._compat import (
    Arguments,
    DispatchMode,
    as_bytes,
    copy_of,
    dense_tensors,
    outside_of_modes,
    storage_key,
)
from fusion_compile._compat import is_of_a_trace


class RealWritesPutBack(DispatchMode):  # type: ignore[misc]
    """Inside, what writes a real tensor in place is let through; after `put_back` its memory holds what it held.

    Fake mode runs an operator for real where none of its tensors is fake: ``shadow.mul_(0.9)`` on a teacher that nobody
    gave it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._about: dict[Any, Arguments] = {}
        self._kept: dict[Any, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        about = self._about.get(func)
        if about is None:
            about = self._about[func] = Arguments(func)
        if about.written:
            values = about.given(args, kwargs or {})
            for i in about.written:
                for value in values[i] if isinstance(values[i], (list, tuple)) else (values[i],):
                    self._keep(value)
        return func(*args, **(kwargs or {}))

    def put_back(self) -> None:
        """To be called outside of every fake mode."""
        with torch.no_grad():
            for memory, copy in self._kept.values():
                as_bytes(memory).copy_(as_bytes(copy))
        self._kept.clear()

    def _keep(self, value: Any) -> None:
        if not isinstance(value, Tensor) or is_of_a_trace(value) or value.is_meta:
            return
        with outside_of_modes():
            for tensor in dense_tensors(value):
                key = storage_key(tensor)
                if key is not None and key not in self._kept:
                    memory = tensor.untyped_storage()
                    self._kept[key] = memory, copy_of(memory)
