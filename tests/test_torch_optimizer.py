"""`as_torch_optimizer`: the same numbers as a training step, and arguments in one order."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile import compile_training_step, optim
from fusion_compile._state.banks import Layout
from fusion_compile.optim import as_torch_optimizer
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import batches, mlp
from tests.torch_loops import (
    bowl_steps,
    close_to_torch,
    equal,
    train,
    weights,
)


def _alike(layout: Layout, other: Layout, key: str, mine: Tensor, theirs: Tensor) -> bool:
    """A number, or what is kept of each parameter, which may lie in another order."""
    if (bank := layout.bank_of(key)) is None:
        return torch.equal(mine, theirs)
    return equal(dict(layout.by_name(bank, mine)), dict(other.by_name(bank, theirs)))


def side_by_side(name: str, **options: Any) -> None:
    """30 steps of the training step, and of the facade on gradients at the same points: all state, bit for bit."""
    transform = optim.RECIPES[name]()
    step = compile_training_step(Bowl(), loss_fn, optimizer=transform, **options)
    model = Bowl()
    optimizer = as_torch_optimizer(model, transform, **options)
    for i in range(30):
        bowl_steps(model, optimizer, range(i, i + 1))
        step(*noise(i))
        ours = optimizer._inside.records[0].group
        assert ours is not None
        theirs = {k: t for k, t in step._state.items() if k.startswith(("params/", "optimizer/"))}
        assert theirs.keys() == {k for k in ours.state if k.startswith(("params/", "optimizer/"))}
        differing = [k for k, t in theirs.items() if not _alike(ours.layout, step.layout, k, ours.state[k], t)]
        assert not differing, (i, differing)
        assert equal(weights(model), step.gradient_point()), i
    optimizer.eval()
    assert equal(weights(model), weights(step.model))
    assert not equal(weights(model), weights(Bowl()))


@pytest.mark.parametrize("name", optim.RECIPES)
def test_thirty_steps_are_bitwise_those_of_the_training_step(name: str) -> None:
    side_by_side(name, mode="eager")


@pytest.mark.parametrize("name", ["adamw", "sf_normuon"])
def test_thirty_captured_steps_are_bitwise_those_of_the_training_step(name: str) -> None:
    side_by_side(name, backend="aot_eager")


def test_compiled_by_inductor_it_is_torchs_adamw() -> None:
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(model, optim.adamw(lr=1e-2))
    train(model, optimizer, batches(10))
    train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2), batches(10))
    assert len(optimizer._inside.runs) == 1
    close_to_torch(model, reference)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (optim.adamw(), mlp()),
        ("adamw", mlp()),
        ("sf_normuon", "sf_normuon"),
        (functools.partial(optim.adamw, lr=0.5), mlp()),
        ([nn.Parameter(torch.ones(2))], mlp()),
    ],
    ids=["a transform", "a name", "two names", "a callable", "a model second"],
)
def test_arguments_the_wrong_way_round_are_refused_before_anything_is_called(first: Any, second: Any) -> None:
    with pytest.raises(TypeError, match=r"parameters come first and the optimizer second: as_torch_optimizer\(model"):
        as_torch_optimizer(first, second)


def test_the_default_recipe_is_that_of_the_training_step() -> None:
    model = Bowl()
    optimizer = as_torch_optimizer(model, mode="eager")
    bowl_steps(model, optimizer, range(1))
    assert optimizer._inside.transform.name == "sf_normuon"
