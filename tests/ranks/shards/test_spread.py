"""Tests: where the parts of a DTensor lie, as rank 3 of 64 sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fusion_compile._ranks.shards.spread import Box, local_part, spread, spread_of

pytestmark = pytest.mark.usefixtures("third_of_64")


def test_rows_are_cut_and_the_last_ranks_have_none() -> None:
    found = spread((130, 7), init_device_mesh("cpu", (64,)), [Shard(0)])
    assert (found.ranks, found.me, found.cut) == (tuple(range(64)), 3, True)
    assert found.mine == Box((9, 0), (3, 7))
    assert [box.numel for box in found.boxes[43:46]] == [7, 0, 0]
    assert found.cuts_only_before(1)
    assert not found.cuts_only_before(0)


def test_copies_are_no_part_of_it() -> None:
    mesh = init_device_mesh("cpu", (32, 2))
    assert spread((8, 4), mesh, [Replicate(), Shard(0)]).ranks == (2, 3)
    assert spread((8, 4), mesh, [Replicate(), Replicate()]).ranks == (3,)
    both = spread((64, 4), mesh, [Shard(0), Shard(1)])
    assert both.mine == Box((2, 2), (2, 2))
    assert len(both.ranks) == 64


def test_a_mesh_of_one_rank_cuts_nothing() -> None:
    mesh = dist.device_mesh.DeviceMesh("cpu", torch.tensor([3]))
    found = spread((5, 4), mesh, [Shard(0)])
    assert not found.cut
    assert found.mine == Box((0, 0), (5, 4))


def test_state_of_another_shape_lies_on_the_same_ranks() -> None:
    mesh = init_device_mesh("cpu", (32, 2))
    both = spread((64, 4), mesh, [Shard(0), Shard(1)])
    rows = both.like((64, 1))
    assert rows.placements == (Shard(0), Replicate())
    assert (rows.ranks, rows.mine) == (both.ranks, Box((2, 0), (2, 1)))
    assert both.like(()).mine == Box((), ())
    assert both.like((64, 4)) is both


def test_parts_of_a_part() -> None:
    whole = torch.arange(12).view(4, 3)
    assert Box((1, 0), (2, 3)).of(whole).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert Box((4, 0), (0, 3)).of(whole).numel() == 0
    assert Box((0, 2), (4, 1)).of(whole).tolist() == [[2], [5], [8], [11]]


def test_a_sum_that_nobody_has_taken_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (64,))
    p: Any = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"layer.weight \[2, 2\] is a DTensor with P.sum.* no rank has taken yet"):
        spread_of("layer.weight", p)
    assert local_part(p).shape == (2, 2)


def test_a_rank_outside_of_the_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 3 is no part of the mesh"):
        spread((4, 4), dist.device_mesh.DeviceMesh("cpu", torch.arange(8, 16)), [Shard(0)])
