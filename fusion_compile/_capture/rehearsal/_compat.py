"""The private torch API that running user code for real needs. torch 2.11 to 2.15; never a version compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass

DispatchMode: Any = TorchDispatchMode
"""The base class of what sees every operator below autograd, the backward's included."""


def outside_of_modes() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators run as without any fake or tracing mode."""
    return _disable_current_modes()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def dense_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own that `tensor` consists of; `tensor` itself in the ordinary case."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from dense_tensors(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def storage_key(tensor: Tensor) -> StorageWeakRef | None:
    """A weak reference to the memory of a dense tensor, equal for all its views. None where it has none (oneDNN)."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def alive(key: StorageWeakRef) -> torch.UntypedStorage | None:
    """The memory that `key` refers to, or None if it was freed."""
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(key.cdata)
    return storage


def copy_of(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """The same bytes in memory of their own, on the same device."""
    copy: torch.UntypedStorage = memory.clone()  # type: ignore[no-untyped-call]
    return copy


def over_memory(like: Tensor, memory: torch.UntypedStorage) -> Tensor:
    """A tensor with the dtype, sizes, strides and offset of `like` that reads `memory`."""
    blank = torch.empty(0, dtype=like.dtype, device=like.device)
    return blank.set_(memory, like.storage_offset(), like.shape, like.stride())


def as_bytes(memory: torch.UntypedStorage) -> Tensor:
    """uint8 ``[nbytes]`` over `memory`."""
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


class Arguments:
    """What an operator's schema says of its arguments: names, and which are written."""

    def __init__(self, operator: Any) -> None:
        schema = getattr(operator, "_schema", None)  # higher-order operators have none
        arguments = list(schema.arguments) if schema is not None else []
        self.names = [argument.name for argument in arguments]
        self.written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.statistics = [i for i, name in enumerate(self.names) if name in ("running_mean", "running_var")]
        tags = getattr(operator, "tags", ())
        self.may_draw = schema is None or torch.Tag.nondeterministic_seeded in tags
        name = str(schema.name) if schema is not None else ""
        base = name.partition("::")[2]
        self.reads_sizes_only = base.endswith("_like") or base.startswith("new_")
        self.tells_the_cpu = torch.Tag.data_dependent_output in tags or (
            torch.Tag.dynamic_output_shape in tags and base != "index"  # tagged for masks; mostly given integers
        )
        self.wraps_new_memory = base in ("lift_fresh", "lift_fresh_copy")

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values in the schema's order; None where an argument was left to its default."""
        return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(self.names)]
