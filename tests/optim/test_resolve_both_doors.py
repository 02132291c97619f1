"""A name, a transform, or a callable: both doors read the argument `optimizer` alike."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim._resolve import resolve_optimizer, with_rate


def test_names_transforms_and_callables() -> None:
    transform = optim.adamw()
    assert resolve_optimizer(transform) is transform
    assert resolve_optimizer("lion").name == "lion"
    made = resolve_optimizer(functools.partial(optim.adamw, lr=0.5))
    assert (made.name, made.hyperparameters["lr"]) == ("adamw", 0.5)
    assert resolve_optimizer(optim.muon).name == "muon"


@pytest.mark.parametrize(
    ("optimizer", "error", "words"),
    [
        ("adam", ValueError, r"optimizer='adam' is not a recipe; use one of adamw, lion"),
        (3, TypeError, r"optimizer is a int; give a recipe's name"),
        (None, TypeError, r"optimizer is a NoneType"),
        (lambda: "adamw", TypeError, r"optimizer=.* returned a str; it must return a Transform"),
        (lambda params: optim.adamw(), TypeError, r"optimizer is a function; .*without arguments"),
        (torch.optim.AdamW, TypeError, r"optimizer is the class AdamW; .*torch\.optim\.Optimizer cannot be captured"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))]), TypeError, r"optimizer is a SGD"),
        (nn.Linear(2, 2), TypeError, r"optimizer is a Linear"),
    ],
)
def test_anything_else_is_refused_by_both_doors(optimizer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve_optimizer(optimizer)
    with pytest.raises(error, match=words):
        fc.compile_training_step(nn.Linear(2, 2), lambda model, x: model(x).sum(), optimizer=optimizer)
    with pytest.raises(error, match=r"optimizer"):
        optim.as_torch_optimizer(nn.Linear(2, 2), optimizer)


def test_a_rate_replaces_the_recipes_and_needs_one() -> None:
    transform = optim.adamw(lr=1e-3)
    assert with_rate(transform, 0.5)["lr"] == 0.5
    assert with_rate(transform, None) == dict(transform.hyperparameters)
    assert transform.hyperparameters["lr"] == 1e-3
    with pytest.raises(ValueError, match=r"lr was given, but add_decayed_weights has no hyperparameter 'lr'"):
        with_rate(optim.add_decayed_weights(0.1), 0.5)
