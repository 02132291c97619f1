"""Tests: the process group of a set of ranks, as rank 3 of 64 sees it, and what it can send."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fusion_compile._ranks.shards.groups import group_of, refuse_other_devices

pytestmark = pytest.mark.usefixtures("third_of_64")


def test_a_group_that_exists_is_taken() -> None:
    mesh = init_device_mesh("cpu", (32, 2))
    assert group_of(tuple(range(64)), mesh) is dist.group.WORLD
    assert group_of((2, 3), mesh) is mesh.get_group(1)
    own = group_of((3, 9), mesh)
    assert dist.get_process_group_ranks(own) == [3, 9]
    assert group_of((3, 9), mesh) is own


def test_a_group_that_cannot_send_is_refused() -> None:
    class OnlyGpus:
        _device_types = (torch.device("cuda"),)

    with pytest.raises(ValueError, match="layer lie on cpu, and its process group talks on cuda alone"):
        refuse_other_devices(OnlyGpus(), torch.device("cpu"), "layer")
    refuse_other_devices(OnlyGpus(), torch.device("cuda"), "layer")
