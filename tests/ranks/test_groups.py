"""Tests: a mesh's ranks and their groups, seen by rank 3 of 64 in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fusion_compile._ranks.groups import ranks_of


@pytest.mark.usefixtures("third_of_64")
def test_a_mesh_of_one_axis_is_one_group() -> None:
    ranks = ranks_of(init_device_mesh("cpu", (64,)), "cpu")
    assert ranks is not None
    assert (ranks.world, ranks.rank, ranks.everyone) == (64, 3, ranks.shards)


@pytest.mark.usefixtures("third_of_64")
def test_groups_of_neighbours_and_across_them() -> None:
    ranks = ranks_of(init_device_mesh("cpu", (64,)), "cpu")
    assert ranks is not None
    inner, outer = ranks.among(4)
    assert (inner.members, inner.rank) == ((0, 1, 2, 3), 3)
    assert outer is not None
    assert (outer.members, outer.rank) == (tuple(range(3, 64, 4)), 0)
    assert ranks.among(64) == (ranks.everyone, None)


@pytest.mark.usefixtures("third_of_64")
def test_a_mesh_of_two_axes_divides_among_the_second() -> None:
    ranks = ranks_of(init_device_mesh("cpu", (32, 2), mesh_dim_names=("copies", "shards")), "cpu")
    assert ranks is not None
    assert (ranks.shards.members, ranks.shards.rank) == ((2, 3), 1)
    assert ranks.everyone.members == tuple(range(64))
    inner, outer = ranks.among(2)
    assert inner == ranks.shards
    assert outer is not None
    assert outer.members == tuple(range(1, 64, 2))


@pytest.mark.usefixtures("third_of_64")
def test_what_is_no_such_mesh_is_refused() -> None:
    with pytest.raises(TypeError, match="give a DeviceMesh"):
        ranks_of([0, 1], "cpu")
    with pytest.raises(ValueError, match="the model lies on 'cuda'"):
        ranks_of(init_device_mesh("cpu", (64,)), "cuda")
    with pytest.raises(ValueError, match="3 axes"):
        ranks_of(init_device_mesh("cpu", (4, 4, 4)), "cpu")
    with pytest.raises(ValueError, match="not in the mesh"):
        ranks_of(dist.device_mesh.DeviceMesh("cpu", torch.arange(4, 8)), "cpu")
