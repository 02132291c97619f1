"""Views are made once, and again where a tensor is another one or lies elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._program.kept_views import KeptViews


def test_made_once_and_again_where_a_tensor_moved() -> None:
    made: list[int] = []

    def make(bank: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        made.append(1)
        return bank[:2], other.t()

    views, bank, other = KeptViews(make), torch.ones(4), torch.ones(2, 3)
    first = views(bank, other)
    bank.fill_(5.0)
    assert views(bank, other) is first and first[0].tolist() == [5.0, 5.0] and len(made) == 1
    assert views(bank, other.clone())[1].shape == (3, 2) and len(made) == 2
    views(bank, other)
    bank.data = torch.full((4,), 7.0)
    assert views(bank, other)[0].tolist() == [7.0, 7.0] and len(made) == 4
