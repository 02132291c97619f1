"""Tests: parts are sent to owners and come back, of any dtype and uneven; more of it in tests/torch_optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusion_compile._ranks.shards.exchange import Exchange, Item
from fusion_compile._ranks.shards.spread import Box
from tests.several_processes import on_ranks

CPU = torch.device("cpu")
CUTS = {0: [Box((0, 0), (2, 3)), Box((2, 0), (1, 3))], 1: [Box((0, 0), (3, 2)), Box((0, 2), (3, 1))]}
DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn)


def there_and_back(rank: int, world: int) -> None:
    everything = dist.group.WORLD
    items = [
        Item(f"{axis} {dtype}", dtype, tuple(boxes), (axis + at) % 2)
        for axis, boxes in CUTS.items()
        for at, dtype in enumerate(DTYPES)
    ]
    items.append(Item("to look at", torch.float32, tuple(CUTS[0]), None, also=(1,)))
    whole = {i.name: (torch.arange(9).view(3, 3) % 2 + n).to(i.dtype) for n, i in enumerate(items)}
    swap = Exchange(tuple(items), everything, rank, world)
    arrived = {i.name: torch.zeros(3, 3, dtype=i.dtype) for i in items if rank in i.receivers}
    swap.to_owners(lambda i: i.boxes[rank].of(whole[i.name]), arrived, CPU)
    assert all(torch.equal(t.float(), whole[n].float()) for n, t in arrived.items())
    assert ("to look at" in arrived) is (rank == 1)
    parts = {i.name: torch.zeros(i.boxes[rank].shape, dtype=i.dtype) for i in items}
    swap.to_parts(arrived, lambda i: parts[i.name], CPU)
    for item in items[:-1]:
        assert torch.equal(parts[item.name].float(), item.boxes[rank].of(whole[item.name]).float()), item.name
    assert not parts["to look at"].any()


def one_message_each_way(rank: int, world: int) -> None:
    """One all_to_all for all matrices of a dtype."""
    calls: list[int] = []
    send = dist.all_to_all_single

    def counted(arrived: Any, *given: Any, **options: Any) -> Any:
        calls.append(arrived.numel())
        return send(arrived, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        items = tuple(Item(str(i), torch.float32, tuple(CUTS[0]), i % 2) for i in range(8))
        whole = {i.name: torch.zeros(3, 3) for i in items if rank in i.receivers}
        Exchange(items, dist.group.WORLD, rank, world).to_owners(lambda i: torch.ones(i.boxes[rank].shape), whole, CPU)
    assert calls == [4 * 9]
    assert all(t.all() for t in whole.values())


@pytest.mark.parametrize("case", [there_and_back, one_message_each_way])
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)


def test_a_receiver_is_the_owner_and_who_looks_on() -> None:
    item = Item("a", torch.float32, (), 1, also=(3,))
    assert item.receivers == (1, 3)
    with pytest.raises(AttributeError):
        item.owner = 2  # type: ignore[misc]
