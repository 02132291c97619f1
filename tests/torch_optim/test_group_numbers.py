"""The numbers of parameter groups: out of range they are refused when given, written, scheduled and loaded."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile._torch_optim.group_numbers import as_float
from tests.small_models import batches, mlp
from tests.torch_loops import close_to_torch, equal, made, train, weights


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


BAD: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": math.inf},
    {"weight_decay": -1.0},
    {"eps": -1.0},
    {"beta1": 1.5},
    {"beta2": 1.0},
    {"lr": torch.tensor(-1.0)},
    {"lr": lambda step: -1.0},
    {"lr": optim.linear(1e-3, 10, final=-1.0)},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: "-".join(bad))
def test_a_group_with_a_wrong_number_is_refused_and_not_added(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"parameter group 0 sets '{next(iter(bad))}', which"):
        made([{"params": one(), **bad}])
    optimizer = made(one())
    with pytest.raises(ValueError, match=rf"parameter group 1 sets '{next(iter(bad))}', which"):
        optimizer.add_param_group({"params": one(), **bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "lr",
    [-1.0, math.nan, torch.tensor(-1.0), optim.constant(-1.0), lambda step: -1.0],
    ids=["number", "nan", "tensor", "schedule", "function"],
)
def test_the_rate_of_the_constructor_is_looked_at(lr: Any) -> None:
    with pytest.raises(ValueError, match=r"'lr'.* (is -1\.0, but a negative rate|was given nan)"):
        made(one(), lr=lr)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", math.nan), ("beta2", 1.0), ("weight_decay", -0.1)])
def test_a_wrong_number_written_into_a_group_is_refused_at_the_step_and_the_right_one_goes_on(
    name: str, value: float
) -> None:
    model, reference = mlp(), mlp()
    optimizer, theirs = made(model, optim.adamw(lr=1e-2)), torch.optim.AdamW(reference.parameters(), lr=1e-2)
    train(model, optimizer, batches(2))
    before, right = weights(model), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=rf"hyperparameter '{name}'"):
        train(model, optimizer, batches(3)[2:])
    assert equal(weights(model), before) and optimizer.param_groups[0]["steps"] == 2
    optimizer.param_groups[0][name] = right
    train(model, optimizer, batches(3)[2:])
    train(reference, theirs, batches(3))
    close_to_torch(model, reference)


def test_a_schedule_of_a_group_that_leaves_the_range_is_refused_at_that_step() -> None:
    model = mlp()
    optimizer = made(model, lr=lambda step: 1e-2 * (1 - step))
    train(model, optimizer, batches(2))
    before = weights(model)
    with pytest.raises(ValueError, match=r"'lr' is -0\.01, but a negative rate .*schedule gave that at step 2: "):
        train(model, optimizer, batches(3)[2:])
    assert equal(weights(model), before)


def test_a_tensor_rate_follows_its_tensor_as_in_torch() -> None:
    """As ``torch.optim.AdamW(lr=tensor)``: whoever holds the tensor changes the rate by writing into it."""
    model, reference = mlp(), mlp()
    ours, rate = torch.tensor(1e-2), torch.tensor(1e-2)
    optimizer = made(model, optim.adamw(), lr=ours)
    theirs = torch.optim.AdamW(reference.parameters(), lr=rate)
    assert optimizer.param_groups[0]["lr"] is ours
    for i, batch in enumerate(batches(4)):
        ours.fill_(1e-2 / (i + 1))
        rate.fill_(1e-2 / (i + 1))
        train(model, optimizer, [batch])
        train(reference, theirs, [batch])
    close_to_torch(model, reference)


def test_a_schedule_written_into_a_group_is_in_force() -> None:
    model, reference = mlp(), mlp()
    optimizer, theirs = made(model, optim.adamw()), torch.optim.AdamW(reference.parameters())
    optimizer.param_groups[0]["lr"] = optim.linear(1e-2, total_steps=4)
    for i, batch in enumerate(batches(4)):
        theirs.param_groups[0]["lr"] = 1e-2 * (1 - i / 4)
        train(model, optimizer, [batch])
        train(reference, theirs, [batch])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-2)
    close_to_torch(model, reference)


def test_a_recipe_with_a_wrong_number_is_refused_where_it_is_named() -> None:
    with pytest.raises(ValueError, match=r"beta1 is 1\.5, but the decay of an average lies below 1"):
        made(one(), functools.partial(optim.adamw, betas=(1.5, 0.9)))


def test_a_tensor_is_read_only_when_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU reading it waits for the device."""
    model, rate, read = mlp(), torch.tensor(1e-2), list[float]()
    optimizer = made(model, lr=rate)

    def counted(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            read.append(float(value))
        return as_float(value)

    monkeypatch.setattr("fusion_compile._torch_optim.group_record.as_float", counted)
    train(model, optimizer, batches(3))
    once = len(read)
    train(model, optimizer, batches(3))
    assert len(read) == once
    rate.fill_(0.5)
    train(model, optimizer, batches(3))
    assert read[once:] == [0.5]
