"""Private API of tensors' memory: whether it is still there, without keeping it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MemorySeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, remember what memory operators make, besides that of `known` tensors, without keeping it alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(one, Tensor) and one.layout is torch.strided:
                storage = one.untyped_storage()
                if storage._cdata not in self._known and not self._is_alive(storage._cdata):
                    self._made[storage._cdata] = storage._weak_ref(), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes that are still alive: after a forward, what the backward will read."""
        return sum(size for at, (_, size) in self._made.items() if self._is_alive(at))

    def _is_alive(self, at: int) -> bool:
        return at in self._made and not torch.UntypedStorage._expired(self._made[at][0])
