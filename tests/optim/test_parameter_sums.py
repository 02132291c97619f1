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
def test_sums_are_those_of_each_parameter(lengths: list[int]) -> None:
    """Integers, so exact. Two million entries take a third level."""
    named = {str(i): torch.randint(-3, 4, (n,)).float() for i, n in enumerate(lengths)}
    banks, info, back = flat_bank(named)
    bank = banks["scalar/flat"]
    sums = ParameterSums(info.places[::-1])  # in whatever order
    sums.prepare(bank)
    wanted = torch.stack([p.sum() for p in named.values()])
    assert torch.equal(sums.sums(bank), wanted)
    assert sums.entries(bank).tolist() == lengths
    scaled = back(sums.scale(bank, torch.arange(1.0, len(lengths) + 1)))
    assert all(torch.equal(scaled[n], p * (int(n) + 1)) for n, p in named.items())


def test_sums_work_unprepared_and_without_values() -> None:
    places = (Place("a", (3,), 0), Place("b", (2, 2), 4))
    bank = torch.arange(8.0)
    assert ParameterSums(places).sums(bank).tolist() == [3.0, 22.0]
    assert ParameterSums(places).sums(bank.to("meta")).shape == (2,)


def test_tables_are_built_once_and_keep_their_address() -> None:
    """A CUDA graph reads them in place; another address would be another recording."""
    sums, bank = ParameterSums((Place("a", (3,), 0), Place("b", (2, 2), 4))), torch.arange(8.0)
    sums.prepare(bank)
    tables = sums._on(bank)
    held = [tables.entries, tables.owner, *(t for level in tables.levels for t in level[:2])]
    assert all(getattr(table, "_dynamo_static_input_type", "") == "unguarded" for table in held)
    sums.prepare(bank.clone())
    assert sums._on(bank) is tables
