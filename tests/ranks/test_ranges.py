"""Tests: a flat bank is cut into ranges of entries, and comes together again bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion_compile._ranks import ranges as module
from fusion_compile._ranks.groups import Group
from fusion_compile._ranks.ranges import Ranges, ranges
from fusion_compile._state.banks import Bank
from fusion_compile.optim._transform import Place

SHAPES = [("a", (5, 7)), ("b", (3,)), ("c", (2, 3, 4)), ("d", ()), ("e", (17,))]


def flat_bank() -> Bank:
    places, at = [], 0
    for name, shape in SHAPES:
        order = (1, 0) if name == "a" else ()
        places.append(Place(name, shape, at, order))
        at += -(-places[-1].numel // 4) * 4
    return Bank("elementwise/float32", torch.float32, None, tuple(places), at)


@pytest.fixture(params=[(2, 1), (2, 3), (4, 1), (4, 2), (3, 4)], ids=lambda p: f"{p[0]} ranks, {p[1]} pieces")
def divided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Ranges]:
    """What each rank has."""
    size, pieces = request.param
    bank = flat_bank()
    monkeypatch.setattr(module, "LEAST_BYTES", bank.length * 4 / pieces)
    found = [ranges(bank, Group("g", tuple(range(size)), rank), None, 4) for rank in range(size)]
    return [each for each in found if each is not None]


def values() -> tuple[list[torch.Tensor], torch.Tensor]:
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, (_, shape) in enumerate(SHAPES)]
    parts[0] = parts[0].t().contiguous().t()
    return parts, flat_bank().join(parts, torch.float32)


def gathered(divided: list[Ranges], sent: Callable[[Ranges], list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(both) for both in zip(*map(sent, divided), strict=True)]


def test_every_entry_is_one_ranks(divided: list[Ranges]) -> None:
    _, whole = values()
    assert sum(each.kept for each in divided) == len(whole)
    assert torch.equal(torch.cat([each.own(whole) for each in divided]).sort().values, whole.sort().values)
    assert max(e.kept for e in divided) - min(e.kept for e in divided) <= 4 * len(divided) * len(divided[0].pieces)


def test_parts_make_the_whole(divided: list[Ranges]) -> None:
    parts, whole = values()
    both = gathered(divided, lambda each: each.sent(each.own(whole)))
    assert torch.equal(divided[0].whole(both), whole)
    views = divided[0].views(both)
    assert all(torch.equal(views[name], part) for (name, _), part in zip(SHAPES, parts, strict=True))
    assert views["a"].stride() == parts[0].stride()


def test_gradients_arrive_where_their_entries_are_owned(divided: list[Ranges]) -> None:
    parts, whole = values()
    for rank, each in enumerate(divided):
        sums = [p.chunk(len(divided))[rank] for p in each.leaving(parts, torch.float32)]
        assert torch.equal(each.arrived(sums), each.own(whole))


def test_the_owned_bank_has_its_entries_under_their_names(divided: list[Ranges]) -> None:
    parts, whole = values()
    flat = {name: (p.t() if name == "a" else p).reshape(-1) for (name, _), p in zip(SHAPES, parts, strict=True)}
    for each in divided:
        owned, mine = each.owned, each.own(whole)
        assert owned.length == each.kept
        for place, part in zip(owned.places, owned.split(mine), strict=True):
            assert part.shape == place.shape
            assert all(float(entry) in flat[place.name].tolist() for entry in part)


def test_a_bank_that_leaves_a_rank_without_stays_whole() -> None:
    bank = Bank("elementwise/float32", torch.float32, None, (Place("a", (6,), 0),), 8)
    assert ranges(bank, Group("g", (0, 1, 2), 0), None, 4) is None
    assert ranges(bank, Group("g", (0, 1), 0), None, 4) is not None
