"""Tests: collectives on one rank alone answer as if every rank had what this one has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusion_compile._ranks import _compat
from fusion_compile._ranks.alone import Alone, Quiet
from fusion_compile._ranks.groups import Group


@pytest.fixture
def group() -> Iterator[Group]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield Group(_compat.name_of(dist.group.WORLD), (0, 1, 2), 1)
    dist.destroy_process_group()


def test_sums_parts_and_gathers(group: Group) -> None:
    own = torch.arange(6.0).view(3, 2)
    with Alone({group.name: group}):
        summed = _compat.wait(_compat.start_all_reduce(own, group.name))
        part = _compat.wait(_compat.start_reduce_scatter(own, 3, group.name))
        gathered = _compat.wait(_compat.start_all_gather(own[:1], 3, group.name))
    assert torch.equal(summed, own * 3)
    assert torch.equal(part, own[1:2] * 3)
    assert torch.equal(gathered, own[:1].expand(3, 2))


def test_a_compiled_program_is_alone_too(group: Group) -> None:
    def mean(x: torch.Tensor) -> torch.Tensor:
        return _compat.wait(_compat.start_all_reduce(x * 2, group.name)) / 3

    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(torch._dynamo.lookup_backend("aot_eager")(graph, inputs))

        def run(*given: torch.Tensor) -> object:
            with Alone({group.name: group}):
                return compiled[0](*given)

        return run

    x = torch.randn(4)
    assert torch.allclose(torch.compile(mean, backend=backend, fullgraph=True)(x), 2 * x)


def test_a_collective_of_the_loss_is_refused_by_its_name(group: Group) -> None:
    with Alone({}), pytest.raises(ValueError, match=r"the loss itself communicates \(_c10d_functional.all_reduce"):
        _compat.start_all_reduce(torch.ones(2), group.name)
    with Alone({group.name: group}), pytest.raises(ValueError, match="the loss itself communicates"):
        dist.all_reduce(torch.ones(2))


def test_where_a_loss_runs_first_nothing_is_sent(group: Group) -> None:
    with Quiet():
        assert (torch.ones(2) * 2).sum() == 4
        for act in (
            lambda: dist.all_reduce(torch.ones(1)),
            lambda: _compat.start_all_reduce(torch.ones(1), group.name),
        ):
            with pytest.raises(ValueError, match="the loss itself communicates"):
                act()
