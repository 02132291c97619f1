"""Tests: what a captured graph communicates, in words that do not depend on the rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusion_compile._ranks import _compat
from fusion_compile._ranks.fingerprint import collectives, fingerprint, operation
from fusion_compile._ranks.groups import Group


@pytest.fixture
def name() -> Iterator[str]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield _compat.name_of(dist.group.WORLD)
    dist.destroy_process_group()


def test_lines_have_operation_shape_dtype_and_number_of_ranks(name: str) -> None:
    graphs: list[fx.GraphModule] = []

    def seen(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    def step(x: torch.Tensor) -> torch.Tensor:
        first = _compat.start_reduce_scatter(x * 2, 4, name)
        return _compat.wait(_compat.start_all_reduce(_compat.wait(first), name))

    torch.compile(step, backend=seen, fullgraph=True)(torch.ones(8, 2))
    assert fingerprint(graphs[0], {name: Group(name, (0, 1, 2, 3), 1)}) == (
        "reduce_scatter_tensor of [8, 2] torch.float32 among 4",
        "all_reduce of [2, 2] torch.float32 among 4",
    )
    assert "among others" in fingerprint(graphs[0], {})[0]
    assert [operation(node) for node in collectives(graphs[0])] == ["reduce_scatter_tensor", "all_reduce"]
