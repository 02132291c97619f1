"""Which ranks a step runs on: the groups of a device mesh, by the names that a captured graph keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from fusion_compile._ranks._compat import group_among, name_of


class Group(NamedTuple):
    """A process group. `name`: by which operators find it. `members`: ranks of the default group, in its own order.
    `rank`: this process's place among them."""

    name: str
    members: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        return len(self.members)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh.

    Attributes:
        everyone: All ranks of the mesh; each sees its own part of a batch.
        shards: Those among which state is divided. On a mesh of one axis they are all.
        device_type: Of the mesh.
        backend: By which tensors travel, ``"nccl"`` or ``"gloo"``.
    """

    everyone: Group
    shards: Group
    device_type: str
    backend: str

    @property
    def world(self) -> int:
        return self.everyone.size

    @property
    def rank(self) -> int:
        return self.everyone.rank

    def among(self, size: int) -> tuple[Group, Group | None]:
        """Groups of `size` neighbouring ranks, and across them groups of those that stand at the same place.

        `size` divides ``shards.size``. All ranks call this together. The second is None where nobody else is left.
        """
        members, own = self.everyone.members, self.everyone.rank
        inner = _made(members[own - own % size :][:size], own % size, self)
        across = members[own % size :: size]
        return inner, None if len(across) == 1 else _made(across, own // size, self)


def _made(members: tuple[int, ...], rank: int, ranks: Ranks) -> Group:
    for known in (ranks.everyone, ranks.shards):
        if known.members == members:
            return known
    return Group(name_of(group_among(list(members))), members, rank)


def ranks_of(mesh: Any, device_type: str) -> Ranks | None:
    """The ranks of ``mesh=``, a ``DeviceMesh`` of one axis, or of two (copies, shards). None for a mesh of one rank.

    All ranks of the mesh call this together. `device_type`: where the model lies.

    Raises TypeError or ValueError for what is no such mesh, or lies elsewhere.
    """
    if type(mesh).__name__ != "DeviceMesh":
        raise TypeError(
            f"mesh={mesh!r} is a {type(mesh).__name__}; give a DeviceMesh: "
            f"torch.distributed.device_mesh.init_device_mesh({device_type!r}, (number of ranks,))."
        )
    if mesh.ndim > 2:
        raise ValueError(
            f"mesh has {mesh.ndim} axes, {tuple(mesh.mesh.shape)}; a step takes one axis, or two: (copies, shards). "
            f"Give the part of it over which the batch is divided: mesh['dp']."
        )
    if mesh.get_coordinate() is None:
        raise ValueError("this rank is not in the mesh that it was given; make the step on the mesh's ranks alone.")
    if mesh.device_type != device_type:
        raise ValueError(
            f"the mesh is of {mesh.device_type!r} devices and the model lies on {device_type!r}; give both the same."
        )
    members = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    if len(members) == 1:
        return None
    group = mesh.get_group(mesh.ndim - 1)
    shards = Group(name_of(group), tuple(dist.get_process_group_ranks(group)), dist.get_rank(group))
    everyone = shards
    if len(shards.members) < len(members):
        everyone = Group(name_of(group_among(list(members))), members, members.index(dist.get_rank()))
    return Ranks(everyone, shards, device_type, str(dist.get_backend(group)))
