"""Tests: who has what while an update runs, as rank 3 of 64 sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fusion_compile._ranks.shards.holdings import Wanted, device_of, exchanges, holdings

pytestmark = pytest.mark.usefixtures("third_of_64")


def _parameter(shape: tuple[int, int]) -> Any:
    mesh = init_device_mesh("cpu", (64,))
    rows = -(-shape[0] // 64)
    own = torch.zeros(max(0, min(rows, shape[0] - 3 * rows)), shape[1])
    return nn.Parameter(
        DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))
    )


WHOLE, CUT = Wanted(lambda spread: False, 2.0), Wanted(lambda spread: True, 1.0)


def test_four_matrices_have_four_owners_and_nobody_is_idle() -> None:
    parameters = {**{f"m{i}": _parameter((128, 8)) for i in range(4)}, "bias": _parameter((2, 1))}
    wanted = {n: CUT if n == "bias" else WHOLE for n in parameters}
    held = holdings(parameters, wanted)
    assert [held[f"m{i}"].owner for i in range(4)] == [0, 1, 2, 3]
    assert held["m3"].has_whole
    assert not held["m2"].has_whole
    assert held["bias"].owner is None
    assert held["bias"].also == tuple(range(4, 64))  # they own nothing, and have no part of it
    assert not held["bias"].has_part
    assert not held["bias"].is_copy
    (swap,) = exchanges(parameters, held)
    assert [item.receivers[:2] for item in swap.items] == [(0,), (1,), (2,), (3,), (4, 5)]
    assert device_of(parameters["m0"]).type == "cpu"


def test_what_may_be_cut_is_sent_nowhere() -> None:
    parameters = {"a": _parameter((128, 8)), "b": _parameter((64, 1))}
    held = holdings(parameters, {"a": CUT, "b": CUT})
    assert all(h.has_part and not h.has_whole and not h.also for h in held.values())
    assert [swap.items for swap in exchanges(parameters, held)] == [()]
