"""Tests: ranks that differ are stopped together, with what differs; flags of any rank are heard by all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from fusion_compile._ranks.shards.agreement import agree
from tests.several_processes import on_ranks

CPU = torch.device("cpu")


def same(rank: int, world: int) -> None:
    flags = [rank == 1, False, True]
    assert agree(dist.group.WORLD, {"numbers": "lr=1; beta=2"}, CPU, flags, remedy="") == [True, False, True]


def another(rank: int, world: int) -> None:
    said = {"steps": "3", "numbers": f"lr={rank}; beta=2"}
    sentence = "ranks differ in numbers: rank 0 has lr=0, rank 1 has lr=1. Nothing was changed. Do the same."
    with pytest.raises(RuntimeError, match=sentence):
        agree(dist.group.WORLD, said, CPU, [False], remedy="Do the same.")
    with pytest.raises(RuntimeError, match="rank 0 has no such entry, rank 1 has b; c; d; …"):
        agree(dist.group.WORLD, {"names": "a" if rank == 0 else "a; b; c; d; e"}, CPU, [], remedy="")


@pytest.mark.parametrize("case", [same, another])
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)
