"""Tests: torch still says which part of a tensor lies where."""

from __future__ import annotations

from types import SimpleNamespace

from torch.distributed.tensor import Replicate, Shard

from fusion_compile._ranks.shards._compat import part_at


def test_parts_of_rows_are_rounded_up() -> None:
    mesh = SimpleNamespace(shape=(2, 4))
    assert part_at((10, 3), mesh, (1, 3), [Replicate(), Shard(0)]) == ((1, 3), (9, 0))
    assert part_at((10, 4), mesh, (1, 0), [Shard(1), Shard(0)]) == ((3, 2), (0, 2))
    assert part_at((2, 3), mesh, (0, 3), [Replicate(), Shard(0)])[0] == (0, 3)
