"""Adam's moments in given bases, by hand."""

from __future__ import annotations

import torch

from fusion_compile.optim._adam_in_basis import Bases, Moments, direction, update_moments

SWAP = {"w": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
SIGNS = {"w": torch.diag(torch.tensor([1.0, -1.0]))}
G = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
HALF, QUARTER = torch.tensor(0.5), torch.tensor(0.25)


def test_moments_are_those_of_the_rotated_gradient() -> None:
    zero = {"w": torch.zeros(2, 2)}
    moments = update_moments(Moments(zero, zero), G, Bases(SWAP, SIGNS), HALF, QUARTER, torch.tensor(False))
    rotated = torch.tensor([[3.0, -4.0], [1.0, -2.0]])  # rows swapped, the second column's sign turned
    assert torch.equal(moments.mu["w"], 0.5 * rotated) and torch.equal(moments.nu["w"], 0.75 * rotated.square())


def test_the_first_gradient_counts_as_zero() -> None:
    old = Moments({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)})
    moments = update_moments(old, G, Bases(SWAP, SIGNS), HALF, QUARTER, torch.tensor(True))
    assert torch.equal(moments.mu["w"], torch.full((2, 2), 0.5))
    assert torch.equal(moments.nu["w"], torch.full((2, 2), 0.25))


def test_the_direction_is_rotated_back() -> None:
    moments = Moments({"w": torch.tensor([[2.0, 4.0], [6.0, 8.0]])}, {"w": torch.full((2, 2), 4.0)})
    assert direction(moments, Bases(SWAP, SIGNS), 0.0)["w"].tolist() == [[3.0, -4.0], [1.0, -2.0]]
