"""Private torch API of the torch optimizer: what Dynamo tells when it compiles, operators on many tensors, who else
refers to memory, and whether a loss is scaled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_compile._tracked import tracked


class OnCompile:
    """Calls `callback` each time that Dynamo begins to compile, until `remove`. Where torch does not tell, never."""

    def __init__(self, callback: Callable[[], None]) -> None:
        def begins(*_: object) -> None:
            callback()

        self._begins = begins
        self._handler: Any = _handler()
        self.listen()

    def listen(self) -> None:
        """Be sure that it is called: ``torch.compiler.reset()`` forgets callbacks."""
        if self._handler is not None and self._begins not in self._handler.start_callbacks:
            self._handler.register_start_callback(self._begins)

    def remove(self) -> None:
        """Call it no more."""
        if self._handler is not None and self._begins in self._handler.start_callbacks:
            self._handler.remove_start_callback(self._begins)
        self._handler = None


def _handler() -> Any:
    try:
        return importlib.import_module("torch._dynamo.callback").callback_handler
    except (ImportError, AttributeError):
        return None


def copy_each(into: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy each tensor of `given` into its partner, in one call."""
    torch._foreach_copy_(list(into), list(given))


def clear_each(tensors: Sequence[Tensor]) -> None:
    """Set every entry of the tensors to zero, in one call."""
    torch._foreach_zero_(list(tensors))


def negate_each(tensors: Sequence[Tensor]) -> None:
    """Change the sign of every entry of the tensors, in one call."""
    torch._foreach_neg_(list(tensors))


def references_to_memory(tensor: Tensor) -> int:
    """How many tensors and other objects refer to the memory of `tensor`, this question among them; 0 where torch does
    not tell."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    return 0 if count is None else int(count(tensor.untyped_storage()._cdata))


def norm_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, 0-dim, in one call."""
    return list(torch._foreach_norm(list(tensors)))


def is_scaling_losses() -> bool:
    """Whether a GradScaler that has scaled a loss is alive."""
    scalers = (o for o in tracked() if issubclass(type(o), torch.amp.GradScaler))
    return any(scaler.is_enabled() and scaler._scale is not None for scaler in scalers)
