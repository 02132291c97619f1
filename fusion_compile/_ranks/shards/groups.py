"""Process groups of the ranks that talk to each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_MADE: dict[tuple[int, ...], tuple[Any, Any]] = {}
"""Groups that were made here, with the default group of that time: they end with it."""


def group_of(ranks: tuple[int, ...], mesh: Any) -> Any:
    """A process group of `ranks`: all of them call this at the same time. A dimension's of `mesh` where it fits."""
    if ranks == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        if tuple(dist.get_process_group_ranks(group)) == ranks:
            return group
    default, known = dist.group.WORLD, _MADE.get(ranks)
    if known is None or known[0] is not default:
        known = _MADE[ranks] = default, dist.new_group(list(ranks), use_local_synchronization=True)
    return known[1]


def refuse_other_devices(group: Any, device: torch.device, what: str) -> None:
    """ValueError unless `group` can send tensors that lie on `device`. `what`: of whose parts."""
    able = {d.type for d in group._device_types} if hasattr(group, "_device_types") else {device.type}
    if device.type not in able:
        raise ValueError(
            f"the parts of {what} lie on {device.type}, and its process group talks on {', '.join(sorted(able))} "
            f"alone. Start with torch.distributed.init_process_group('cpu:gloo,cuda:nccl'), as offloading to the CPU "
            f"needs, or keep the parameters on {', '.join(sorted(able))}."
        )
