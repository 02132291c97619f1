"""An update is taken piece by piece only where no bit can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusion_compile import optim
from fusion_compile._state.routing import Route
from fusion_compile._torch_optim.piecewise import is_piecewise
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import ELEMENTWISE, SPECTRAL, BankInfos, Context, EmptyState, Extras, Transform

ENTRIES = (Route("weight", (2, 2), ELEMENTWISE, "a test"),)


@pytest.mark.parametrize("name", ["adamw", "lion", "adopt", "sf_adamw", "sf_normuon"])
def test_recipes_that_update_entries_each_alone(name: str) -> None:
    """A recipe for matrices, too, where its group has none."""
    assert is_piecewise(getattr(optim, name)(), ENTRIES)


@pytest.mark.parametrize("name", ["prodigy", "adafactor", "soap", "full_fusion"])
def test_recipes_that_do_not(name: str) -> None:
    assert not is_piecewise(getattr(optim, name)(), ENTRIES)


def test_codes_whose_blocks_share_a_number_are_not_cut() -> None:
    assert not is_piecewise(optim.lion(momentum="int8"), ENTRIES)


def test_matrices_are_not_cut() -> None:
    assert not is_piecewise(optim.adamw(), (*ENTRIES, Route("other", (2, 2), SPECTRAL, "a test")))


def stepping(update: Callable[[Tensor], Tensor]) -> Transform:
    def advance(updates: Tensors, state: EmptyState, params: Tensors, context: Context) -> tuple[Tensors, EmptyState]:
        return {k: -0.1 * update(g) for k, g in updates.items()}, state

    return Transform(lambda params: EmptyState(), advance, Extras(name="a test's"))


@pytest.mark.parametrize(
    ("update", "alone"),
    [
        (torch.sign, True),
        (lambda g: g / g.norm(), False),
        (lambda g: g - g.mean(), False),
        (lambda g: g.flatten().cumsum(0).view_as(g), False),
        (lambda g: g + torch.rand_like(g), False),
        (lambda g: g * (g.shape[0] > 100), False),
        (lambda g: g.nonexistent, False),
    ],
)
def test_what_looks_beyond_an_entry_is_found(update: Callable[[Tensor], Tensor], alone: bool) -> None:
    assert is_piecewise(stepping(update), ENTRIES) is alone


def test_what_knows_names_is_found() -> None:
    def bind(infos: BankInfos) -> Transform:
        named = any("bias" in place.name for info in infos.values() for place in info.places)
        return stepping(lambda g: g * (2.0 if named else 1.0))

    made = stepping(torch.sign)
    assert not is_piecewise(made._replace(extras=made.extras._replace(bind=bind)), ENTRIES)


class Sum(NamedTuple):
    total: Tensor


def test_a_shared_number_that_gradients_change_is_found() -> None:
    def advance(updates: Tensors, state: Sum, params: Tensors, context: Context) -> tuple[Tensors, Sum]:
        (g,) = updates.values()
        return {k: -0.1 * g for k, g in updates.items()}, Sum(state.total + g.sum())

    made = Transform(lambda params: Sum(torch.zeros(())), advance, Extras(name="a test's"))
    assert not is_piecewise(made, ENTRIES)
