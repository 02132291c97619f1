"""Private torch API of this room: collectives by the name of their group, which one captured graph can hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode"]

NAMESPACE = "_c10d_functional"
"""Of the operators that Dynamo, Inductor and a trace on fake tensors know as collectives."""


def _operator(name: str) -> Any:
    return getattr(torch.ops._c10d_functional, name)


def wait(started: Tensor) -> Tensor:
    """The result of a collective that was started."""
    done: Tensor = _operator("wait_tensor")(started)
    return done


def start_all_reduce(tensor: Tensor, group: str) -> Tensor:
    """Start the sum of `tensor` over the ranks of the group of that name."""
    started: Tensor = _operator("all_reduce")(tensor, "sum", group)
    return started


def start_reduce_scatter(tensor: Tensor, size: int, group: str) -> Tensor:
    """Start the sum over `size` ranks of which each gets its part of the leading axis."""
    started: Tensor = _operator("reduce_scatter_tensor")(tensor, "sum", size, group)
    return started


def start_all_gather(tensor: Tensor, size: int, group: str) -> Tensor:
    """Start to lay the tensors of `size` ranks behind each other along the leading axis."""
    started: Tensor = _operator("all_gather_into_tensor")(tensor, size, group)
    return started


def name_of(group: Any) -> str:
    """The name by which operators find a process group."""
    return str(group.group_name)


def group_of(name: str) -> Any:
    """The process group of that name."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_among(ranks: list[int], backend: str | None = None, timeout: Any = None) -> Any:
    """A process group of `ranks`, which these ranks alone make. `backend`: None for the default group's."""
    return dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor of any dtype as the bytes that it lies in, in the same memory."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1).to(torch.uint8)


def timeout_of(device_type: str) -> Any:
    """How long the default group waits for a rank; None where torch does not say."""
    try:
        return dist.distributed_c10d._get_default_group()._get_backend(torch.device(device_type)).options._timeout
    except (AttributeError, RuntimeError, ValueError):
        return None


def store() -> Any:
    """The key-value store by which the ranks found each other; None where torch keeps none."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
