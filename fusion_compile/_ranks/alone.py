"""A program with collectives, run by one rank alone: as if every rank had what this one has.

What a rank proves about its program (that it computes the ordinary loop's loss and gradient) it proves before it meets
the others, so that a proof that fails leaves nobody waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_compile._ranks._compat import NAMESPACE, DispatchMode
from fusion_compile._ranks.groups import Group


class Alone(DispatchMode):  # type: ignore[no-untyped-call]
    """Inside, collectives of the groups (by name) answer at once, with this rank's tensors in the place of all.

    A collective of another group is the loss's own, and refused with a ValueError.
    """

    def __init__(self, groups: Mapping[str, Group]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._groups = groups

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            raise ValueError(own_collective(func))
        if func.namespace != NAMESPACE:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "wait_tensor":
            return args[0]
        group = self._groups.get(str(args[-1] if "group_name" not in kwargs else kwargs["group_name"]))
        if group is None:
            raise ValueError(own_collective(func))
        return _stand_in(name, group, args, kwargs)


class Quiet(DispatchMode):  # type: ignore[no-untyped-call]
    """Inside, a loss runs on this rank alone: a collective of its own is refused with a ValueError before it begins."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", NAMESPACE) and "wait_tensor" not in str(func):
            raise ValueError(own_collective(func))
        return func(*args, **(kwargs or {}))


def _stand_in(name: str, group: Group, args: Any, kwargs: Any) -> Any:
    tensors = args[0]
    if name == "all_reduce":
        return tensors * group.size
    if name == "all_reduce_":
        return tensors.mul_(group.size)
    if name == "all_reduce_coalesced":
        return [t * group.size for t in tensors]
    if name == "all_reduce_coalesced_":
        return [t.mul_(group.size) for t in tensors]
    if name == "all_gather_into_tensor":
        return _tiled(tensors, group)
    if name == "all_gather_into_tensor_out":
        return kwargs["out"].copy_(_tiled(tensors, group))
    if name == "all_gather_into_tensor_coalesced":
        return [_tiled(t, group) for t in tensors]
    if name == "reduce_scatter_tensor":
        return _part(tensors, group)
    if name == "reduce_scatter_tensor_out":
        return kwargs["out"].copy_(_part(tensors, group))
    if name == "reduce_scatter_tensor_coalesced":
        return [_part(t, group) for t in tensors]
    raise ValueError(f"the collective {name} has no stand-in; please report this.")


def _tiled(tensor: Tensor, group: Group) -> Tensor:
    return torch.cat([tensor] * group.size)


def _part(tensor: Tensor, group: Group) -> Tensor:
    return tensor.chunk(group.size)[group.rank] * group.size


def own_collective(func: Any) -> str:
    """Why a loss that communicates itself is refused."""
    return (
        f"the loss itself communicates ({func}), as SyncBatchNorm and gathered features do. With mesh= a step reduces "
        f"gradients, loss, metrics and changed buffers, and a loss computes on this rank's batch alone; leave the "
        f"collective out, or train with DistributedDataParallel and as_torch_optimizer()."
    )
