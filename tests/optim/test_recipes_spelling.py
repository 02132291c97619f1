"""One spelling for one thing in all recipes: pairs of decays, the dtype of matrix products."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_compile import optim

MAKERS: dict[str, Callable[..., optim.Transform]] = {**optim.RECIPES, "fusion": optim.fusion}
PAIRS = {
    **dict.fromkeys(["adamw", "lion", "soap"], ("beta1", "beta2")),
    "normuon": ("momentum", "beta2"),
    "sf_adamw": ("schedule_free_beta", "beta2"),
    "sf_normuon": ("schedule_free_beta", "beta2"),
    "fusion": ("schedule_free_beta", "neuron_beta2"),
    "full_fusion": ("schedule_free_beta", "neuron_beta2"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_decays_is_betas(name: str) -> None:
    numbers = MAKERS[name](betas=(0.25, 0.75)).hyperparameters
    assert tuple(numbers[live] for live in PAIRS[name]) == (0.25, 0.75)
    for wrong in (0.9, (0.9,), (0.9, 0.9, 0.9), optim.Named("beta", 0.9)):
        with pytest.raises(TypeError, match=r"^betas=.* is not a pair; give two numbers, \(0\.9, 0\.999\)"):
            MAKERS[name](betas=wrong)


@pytest.mark.parametrize("name", ["muon", "normuon", "fusion", "full_fusion"])
def test_a_pair_of_the_rest_is_scalar_betas(name: str) -> None:
    with pytest.raises(TypeError, match=r"^scalar_betas=0\.9 is not a pair"):
        MAKERS[name](scalar_betas=0.9)


def test_no_recipe_has_another_word() -> None:
    other = {"beta", "beta1", "beta2", "hot_dtype", "adjust_lr", "table"}
    found: dict[str, Any] = {name: other & inspect.signature(make).parameters.keys() for name, make in MAKERS.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize("name", ["muon", "normuon", "sf_normuon", "fusion", "full_fusion"])
def test_the_dtype_of_matrix_products_is_matmul_dtype(name: str) -> None:
    assert MAKERS[name](matmul_dtype=torch.float32).descends
    with pytest.raises(ValueError, match=r"matmul_dtype=torch\.int32"):
        MAKERS[name](matmul_dtype=torch.int32)
