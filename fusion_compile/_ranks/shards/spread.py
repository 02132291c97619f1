"""Where the parts of a DTensor lie: boxes of the whole tensor, one on each rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._ranks.shards._compat import part_at


class Box(NamedTuple):
    """A part of a tensor: where it begins on each axis, and its shape."""

    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The part of `whole` that it means: a view."""
        for axis, (at, size) in enumerate(zip(self.at, self.shape, strict=True)):
            if size != whole.shape[axis]:
                whole = whole.narrow(axis, min(at, whole.shape[axis]), size)
        return whole


@dataclass(frozen=True)
class Spread:
    """How one tensor of `shape` is spread over `ranks`, those that hold its parts: a box for each. `me`: this rank's
    place among them. `mesh`, `placements`: as the DTensor has them; `coordinates`: of the ranks in the mesh. Ranks that
    hold copies of the same parts are no part of it."""

    shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]
    ranks: tuple[int, ...]
    me: int
    boxes: tuple[Box, ...]
    coordinates: tuple[tuple[int, ...], ...]

    @property
    def cut(self) -> bool:
        """Whether the tensor lies in several parts."""
        return len(self.ranks) > 1

    @property
    def mine(self) -> Box:
        """This rank's part."""
        return self.boxes[self.me]

    def cuts_only_before(self, axis: int) -> bool:
        """Whether every part has all entries of the axes from `axis` on."""
        return all(box.numel == 0 or box.shape[axis:] == self.shape[axis:] for box in self.boxes)

    def like(self, shape: tuple[int, ...]) -> Spread:
        """How a tensor of another shape, which belongs to this one, lies on the same ranks: cut along its first axis
        by the first dimension of the mesh that cuts, and the same on all ranks otherwise."""
        if shape == self.shape:
            return self
        from torch.distributed.tensor import Replicate, Shard

        cutting = [i for i, placement in enumerate(self.placements) if cut_axis(placement) is not None]
        first = next((i for i in cutting if shape and self.mesh.shape[i] > 1), None)
        placements = tuple(Shard(0) if i == first else Replicate() for i in range(len(self.placements)))
        boxes = tuple(_box(shape, self.mesh, at, placements) for at in self.coordinates)
        return replace(self, shape=shape, placements=placements, boxes=boxes)

    def tensor(self, part: Tensor) -> Tensor:
        """This rank's `part` as a DTensor."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )


def cut_axis(placement: Any) -> int | None:
    """The axis along which a placement cuts; None for one that copies. ValueError for a sum that is still to be
    taken."""
    if placement.is_partial():
        raise ValueError(f"{placement} is a sum that no rank has taken yet")
    return None if placement.is_replicate() else int(placement.dim)


def spread_of(name: str, p: Any) -> Spread:
    """How the DTensor `p` lies. ValueError for one whose parts are no boxes."""
    try:
        return spread(tuple(p.shape), p.device_mesh, tuple(p.placements))
    except ValueError as error:
        raise ValueError(
            f"{name} {list(p.shape)} is a DTensor with {', '.join(map(str, p.placements))} on a mesh of "
            f"{' × '.join(map(str, p.device_mesh.shape))}: {error}. An optimizer takes parameters whose parts are "
            f"blocks of rows and columns, each on one rank; place it with Shard or Replicate."
        ) from None


def spread(shape: tuple[int, ...], mesh: Any, placements: Sequence[Any]) -> Spread:
    """How a tensor of `shape` lies on `mesh`. ValueError where the parts are no boxes that make it up."""
    own = mesh.get_coordinate()
    if own is None:
        raise ValueError(f"rank {torch.distributed.get_rank()} is no part of the mesh")
    axes = [cut_axis(placement) for placement in placements]
    along = [range(size) if axis is not None else (at,) for axis, size, at in zip(axes, mesh.shape, own, strict=True)]
    coordinates = tuple(itertools.product(*along))
    boxes = tuple(_box(shape, mesh, at, placements) for at in coordinates)
    if math.prod(shape):
        _check_tiling(shape, boxes)
    ranks = tuple(int(mesh.mesh[at]) for at in coordinates)
    return Spread(shape, mesh, tuple(placements), ranks, coordinates.index(tuple(own)), boxes, coordinates)


def _box(shape: tuple[int, ...], mesh: Any, coordinate: tuple[int, ...], placements: Sequence[Any]) -> Box:
    part, at = part_at(shape, mesh, coordinate, placements)
    return Box(at, part)


def _check_tiling(shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """ValueError unless the boxes are a grid: all combinations of intervals that follow each other on every axis."""
    filled = [box for box in boxes if box.numel]
    intervals = 1
    for axis, size in enumerate(shape):
        on_axis = sorted({(box.at[axis], box.shape[axis]) for box in filled})
        ends = [at + length for at, length in on_axis]
        if [at for at, _ in on_axis] != [0, *ends[:-1]] or ends[-1:] != [size]:
            raise ValueError("its parts are no blocks that make up the whole")
        intervals *= len(on_axis)
    if intervals != len(filled):
        raise ValueError("its parts are no blocks that make up the whole")


def local_part(t: Any) -> Tensor:
    """This rank's part of a DTensor, complete; of a plain tensor itself."""
    if not _compat.is_spread_over_devices(t):
        return t  # type: ignore[no-any-return]
    with torch.no_grad():
        part = t.to_local()
        return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def as_placed(t: Any, like: Spread) -> Tensor:
    """This rank's part of the DTensor `t` once it lies as `like`: ranks talk where it lies otherwise."""
    if t.device_mesh != like.mesh:
        t = t.full_tensor()
        return like.mine.of(t)
    if tuple(t.placements) != like.placements:
        t = t.redistribute(like.mesh, like.placements)
    return local_part(t)
