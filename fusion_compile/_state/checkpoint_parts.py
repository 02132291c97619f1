"""The tensors of a checkpoint that several ranks write, each what it owns, with torch.distributed.checkpoint.

Keys are ``<section>.<name>``, as in ``model.blocks.0.weight`` and ``optimizer.mu.blocks.0.weight``, so any number of
ranks finds what it wants, and a process without torch.distributed everything. No tensor is cut: a matrix lies whole on
its owner. A stack of matrices whose owners differ is written matrix by matrix, as ``optimizer.mu.experts.up[3]``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_compile._state import checksums
from fusion_compile._types import Tensors

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError)
"""What reading raises where files are missing or are something else."""


class Lost(OSError):
    """A rank that took part does not any more."""


def write(folder: Path, tensors: Tensors, group: Any) -> dict[str, str]:
    """Write what each rank of `group` gives, on all of them together, and return all checksums by key.

    No key is given by two ranks. Raises OSError on all ranks where one cannot write, and `Lost` where one has ended.
    `group`: of gloo; None for this process alone.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    saving: Any = dcp  # torch gives it no types
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = saving.FileSystemWriter(folder)
            saving.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
        own = checksums.of_tensors(tensors)
        if group is None:
            return own
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, own, group)
    except CheckpointException as error:  # no Exception; all ranks have it
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank} could not write its part: {cause}") from error
    except RuntimeError as error:
        raise Lost(f"another rank has ended, or does not come; torch says: {error}") from error
    return {key: value for sums in heard for key, value in sums.items()}


def read(folder: Path) -> Tensors:
    """All tensors of a folder that `write` wrote, on the CPU. Raises one of `UNREADABLE` for anything else."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    loading: Any = dcp
    reader = loading.FileSystemReader(folder)
    room: Tensors = {}
    for key, found in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{key} is no tensor")
        room[key] = torch.empty(found.size, dtype=found.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            loading.load(room, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise OSError(str(cause)) from error
    return room


def with_whole_stacks(tensors: Tensors, stacks: Mapping[str, Any]) -> Tensors:
    """`tensors` with whole stacks in the place of their matrices.

    `stacks`: by full name, ``{"shape": of the parameter, "matrix": of one of its matrices}``.
    """
    found = dict(tensors)
    for name, form in stacks.items():
        first = f".{name}[0]"
        for base in [key.removesuffix("[0]") for key in tensors if key.endswith(first)]:
            parts: list[Tensor] = []
            while (part := found.pop(f"{base}[{len(parts)}]", None)) is not None:
                parts.append(part)
            whole = torch.stack(parts)
            found[base] = whole.view(form["shape"]) if [*whole.shape[1:]] == form["matrix"] else whole
    return found
