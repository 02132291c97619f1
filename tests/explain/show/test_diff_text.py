"""The difference of two explanations as text."""

from __future__ import annotations

import torch
from torch import Tensor

import fusion_compile as fc


def first(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).relu()


def explained(fn: object, size: int = 4) -> fc.Explanation:
    return fc.explain(fn, (torch.randn(3, size), torch.randn(size, 5)), run=False)


def test_the_same_program_differs_in_nothing() -> None:
    difference = explained(first).diff(explained(first))
    assert not difference
    assert "No difference." in str(difference)
