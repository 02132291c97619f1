"""Tests: who owns which matrix, and that what travels comes back as it was."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._ranks.groups import Group
from fusion_compile._ranks.shares import MOST, Share, cut, parts_of
from fusion_compile._state.banks import Bank
from fusion_compile.optim._transform import Place


def bank(matrices: int, rows: int = 3, columns: int = 2) -> Bank:
    places = tuple(Place(f"blocks.{k}.weight", (rows, columns), k) for k in range(matrices))
    return Bank("spectral/3x2/float32", torch.float32, (rows, columns), places, matrices)


def shares(of: Bank, ranks: int) -> list[Share]:
    pieces = cut(of, ranks, 4)
    return [Share(of, Group("g", tuple(range(ranks)), rank), None, pieces) for rank in range(ranks)]


@pytest.mark.parametrize(("matrices", "ranks"), [(5, 2), (5, 4), (8, 4), (17, 3), (64, 8)])
def test_what_travels_comes_back_as_it_was(matrices: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_compile._ranks.shares.LEAST_BYTES", 24)  # a matrix
    of = bank(matrices)
    whole = torch.randn(of.shape)
    every = shares(of, ranks)
    assert 1 <= len(every[0].pieces) <= MOST
    assert sorted(k for share in every for k in share.mine) == list(range(matrices))
    sizes = {len(share.mine) for share in every}
    assert sizes <= {matrices // ranks, -(-matrices // ranks)}  # as even as can be, and nobody without
    leaving = every[0].leaving(of.split(whole), torch.float32)
    for share in every:
        arrived = share.arrived([piece.chunk(ranks)[share.inner.rank] for piece in leaving])  # type: ignore[union-attr]
        assert torch.equal(arrived, share.own(whole))
        assert share.owned.length == len(share.mine)
        assert [place.name for place in share.owned.places] == [f"blocks.{k}.weight" for k in share.mine]
    sent = [share.sent(share.own(whole)) for share in every]
    gathered = [torch.cat(parts) for parts in zip(*sent, strict=True)]
    assert torch.equal(every[0].whole(gathered), whole)
    views = every[0].views(gathered)
    assert all(torch.equal(views[place.name], part) for place, part in zip(of.places, of.split(whole), strict=True))


def test_a_bank_travels_in_few_pieces_however_deep_the_model() -> None:
    assert [len(cut(bank(k, 4096, 4096), 8, 4)) for k in (8, 64, 512)] == [1, 8, 8]
    assert len(cut(bank(512), 8, 4)) == 1  # small matrices: latency counts


def test_a_bank_is_never_filled_up_for_ranks_that_own_nothing() -> None:
    assert [parts_of(5, ranks) for ranks in (2, 3, 4, 8, 64)] == [2, 3, 4, 4, 4]
    assert [parts_of(1, 8), parts_of(7, 7), parts_of(5, 7)] == [1, 7, 1]


def test_the_matrices_of_a_stack_are_owned_one_by_one() -> None:
    places = (Place("up", (3, 3, 2), 0), Place("gate", (3, 2), 3))
    of = Bank("spectral/3x2/float32", torch.float32, (3, 2), places, 4)
    first, second = shares(of, 2)
    assert [p.name for p in first.owned.places] == ["up[0]", "up[2]"]
    assert [p.name for p in second.owned.places] == ["up[1]", "gate"]
    parts = [torch.randn(3, 3, 2), torch.randn(3, 2)]
    (leaving,) = first.leaving(parts, torch.float32)
    assert torch.equal(first.arrived([leaving[:2]]), torch.stack([parts[0][0], parts[0][2]]))
    whole = of.join(parts, torch.float32)
    gathered = [torch.cat([first.sent(first.own(whole))[0], second.sent(second.own(whole))[0]])]
    views = first.views(gathered)
    assert torch.equal(views["up"], parts[0]) and torch.equal(views["gate"], parts[1])


def test_a_flat_bank_is_whole_on_every_rank() -> None:
    flat = Bank("scalar/float32", torch.float32, None, (Place("a", (3,), 0), Place("b", (2,), 4)), 8)
    share = Share(flat, None, Group("g", (0, 1), 1), cut(flat, 1, 4))
    parts = [torch.ones(3), torch.ones(2)]
    (leaving,) = share.leaving(parts, torch.float32)
    assert leaving.tolist() == [1, 1, 1, 0, 1, 1, 0, 0]
    assert share.arrived([leaving]) is leaving and share.owned is flat
