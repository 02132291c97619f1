"""Private torch API that passes and the sampler need; probed for or stable from torch 2.11 to 2.15."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree

OpOverload = torch._ops.OpOverload
invoke_subgraph = torch.ops.higher_order.invoke_subgraph
TreeSpec = _pytree.TreeSpec
tree_flatten = _pytree.tree_flatten
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_unflatten = _pytree.tree_unflatten


def has_unknown_size(tensor: Tensor) -> bool:
    """Whether a size or stride of a fake tensor is known at run time only, as nonzero's is."""
    numbers = (*tensor.shape, *tensor.stride())
    return any(type(n) is not int and bool(free_unbacked_symbols(n)) for n in numbers)


def number_of_gradient(gradient: Any) -> int:
    """The number of a node of autograd's graph, as tracing notes it at the forward's nodes under ``seq_nr``."""
    return int(gradient._sequence_nr())


def empty_unless_held(tensors: Iterable[Tensor]) -> bool:
    """Give all `tensors`, which share one storage, an empty one; False, with nothing changed, if others hold it too.

    A training step or an EMA that holds the same memory would keep it alive, and the emptied parameter would be lost to
    it.
    """
    tensors = list(tensors)
    storage = StorageWeakRef(tensors[0].untyped_storage())  # type: ignore[no-untyped-call]
    places = [(t.storage_offset(), t.shape, t.stride()) for t in tensors]
    for t in tensors:
        t.data = torch.empty(0, dtype=t.dtype, device=t.device)
    if storage.expired():  # type: ignore[no-untyped-call]
        return True
    alive = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    for t, place in zip(tensors, places, strict=True):
        t.data = torch.empty(0, dtype=t.dtype, device=t.device).set_(alive, *place)
    return False
