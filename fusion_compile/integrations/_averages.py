"""The averages x of Schedule-Free in the parameters for a while, found behind the wrappers that trainers put around."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fusion_compile.torch_optimizer import TorchOptimizer


def of_schedule_free(optimizers: Iterable[Any]) -> list[TorchOptimizer]:
    """Those of `optimizers`, and of what they wrap, whose parameters hold y while training."""
    found = (unwrapped(optimizer) for optimizer in optimizers)
    return [optimizer for optimizer in found if isinstance(optimizer, TorchOptimizer) and optimizer._inside.moves]


def unwrapped(optimizer: Any) -> Any:
    """What lies under ``.optimizer``, as accelerate and Lightning call what they wrap."""
    while not isinstance(optimizer, TorchOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextlib.contextmanager
def averaged(optimizers: Iterable[Any]) -> Iterator[None]:
    """Inside, parameters hold x, for a model that is saved there; afterwards, what they held before."""
    switched = [optimizer for optimizer in of_schedule_free(optimizers) if optimizer.training]
    for optimizer in switched:
        optimizer._inside.guards.saves_averages = True
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switched:
            optimizer.train()


def kept(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose tensors no longer follow the parameters, which hold y again before it is written."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in saved.items()}
