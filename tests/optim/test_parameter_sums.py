"""`ParameterSums`: sums over each parameter of a flat bank."""

from __future__ import annotations

import pytest
import torch

from fusion_compile.optim._parameter_sums import ParameterSums
from fusion_compile.optim._transform import Place
from tests.optim.walks import (
    flat_bank,
)


@pytest.mark.parametrize(
    "lengths", [[1], [4, 3, 1025], [1024, 1024], [2 * 1024 * 1024 + 5, 3], [7] * 300, [1024 * 1024]]
)
def test_member_sums_are_sums_over_members(lengths: list[int]) -> None:
    """Integers, so exact. Two million entries take a third level."""
    named = {str(i): torch.randint(-3, 4, (n,)).float() for i, n in enumerate(lengths)}
    banks, facts, back = flat_bank(named)
    bank = banks["scalar/flat"]
    members = ParameterSums(facts.members[::-1])  # in whatever order
    members.prepare(bank)
    wanted = torch.stack([p.sum() for p in named.values()])
    assert torch.equal(members.sums(bank), wanted)
    assert members.entries(bank).tolist() == lengths
    scaled = back(members.scale(bank, torch.arange(1.0, len(lengths) + 1)))
    assert all(torch.equal(scaled[n], p * (int(n) + 1)) for n, p in named.items())


def test_member_sums_work_unprepared_and_without_values() -> None:
    facts = (Place("a", (3,), 0), Place("b", (2, 2), 4))
    bank = torch.arange(8.0)
    assert ParameterSums(facts).sums(bank).tolist() == [3.0, 22.0]
    assert ParameterSums(facts).sums(bank.to("meta")).shape == (2,)
