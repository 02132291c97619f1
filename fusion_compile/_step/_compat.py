"""Private API of tensors' memory: whether it is still there, without keeping it, and which of it operators write."""

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


class StatisticsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, collect the running statistics that batch norms update in `tensors`.

    Their operators' schemas do not declare that write, so it bumps no version.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [a.name for a in func._schema.arguments]
        if "running_mean" in names:
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if given.get("training", True):
                self.tensors += [given[n] for n in ("running_mean", "running_var") if given.get(n) is not None]
        return func(*args, **(kwargs or {}))


class WritesSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, collect which memory operators write in place, through whatever view or ``.data``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: set[int] = set()
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else (kwargs or {}).get(argument.name)
                for one in given if isinstance(given, (list, tuple)) else (given,):
                    if isinstance(one, Tensor):
                        self._written.add(one.untyped_storage()._cdata)
                        self._alive.append(one)  # its memory's address means nothing once it is gone
        return func(*args, **(kwargs or {}))

    def holds(self, tensor: Tensor) -> bool:
        """Whether the memory of `tensor` was written."""
        return tensor.untyped_storage()._cdata in self._written
