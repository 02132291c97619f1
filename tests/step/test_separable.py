"""Tests: which recipes can be updated apart, parameter by parameter, and which entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_compile import optim
from fusion_compile._step.separable import is_entry_by_entry, refuse_inseparable
from fusion_compile._types import Tensors
from fusion_compile.optim._registry import factory_of, names
from fusion_compile.optim._transform import Context, EmptyState, Transform, stateless
from fusion_compile.optim._tree import number_like

WHOLE = {"adafactor", "adakaon", "adamuon", "adapnm", "autokaon", "fusionopt_compat", "nekaon"}
"""Recipes that look at more than one entry of an elementwise parameter, or keep a number of it."""


@pytest.mark.parametrize("name", names())
def test_elementwise_parameters_are_cut_where_every_entry_is_its_own(name: str) -> None:
    factory = factory_of(name)
    assert factory is not None
    assert is_entry_by_entry(factory()) is (name not in WHOLE)


def test_codes_for_many_entries_are_not_cut() -> None:
    assert not is_entry_by_entry(optim.stored(optim.adamw(), mu="int8"))
    assert is_entry_by_entry(optim.adamw())


@pytest.mark.parametrize("name", ["prodigy", "autokaon", "fusionopt_compat"])
def test_a_recipe_that_pools_is_refused_by_name(name: str) -> None:
    factory = factory_of(name)
    assert factory is not None
    with pytest.raises(ValueError, match=f"{name} cannot update parameters that lie on several ranks"):
        refuse_inseparable(factory())


def _by_number_of_parameters() -> Transform:
    """Divides the update by how many matrices there are: no gradient tells, and it declares nothing."""

    def update(updates: Tensors, params: Tensors, context: Context) -> Tensors:
        return {k: -0.1 * u / u.shape[0] for k, u in updates.items()}

    return stateless(update, {}, "by_number", descends=True).with_extras(roles=("spectral",))


def test_what_a_trial_finds_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"by_number cannot .* which changes with which others there are"):
        refuse_inseparable(_by_number_of_parameters())
    mean = stateless(lambda u, p, c: {k: v - v.mean() for k, v in u.items()}, {}, "less_mean", descends=True)
    with pytest.raises(ValueError, match=r"less_mean cannot .* which changes with others' gradients"):
        refuse_inseparable(mean)
    refuse_inseparable(optim.adamw())


def test_a_part_that_cannot_be_tried_is_updated_whole() -> None:
    def update(updates: Tensors, state: Tensor, params: Tensors, context: Context) -> tuple[Tensors, Tensor]:
        raise RuntimeError("needs a GPU")

    def init(params: Tensors) -> Tensor:
        return number_like(params, 0.0)

    assert not is_entry_by_entry(Transform(init, update))
    assert not is_entry_by_entry(Transform(lambda p: EmptyState(), update))
    assert torch.is_tensor(init({"scalar": torch.ones(2)}))
