"""torch's pair of betas as an alias, what schedulers do with it, and words that say nothing here."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from fusion_compile import optim
from fusion_compile._torch_optim.torch_words import betas_of, decay_is_theirs, split_betas, without_torchs_words
from tests.small_models import batches, mlp
from tests.torch_loops import close_to_torch, made, train


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("adamw", ("beta1", "beta2")),
        ("lion", ("beta1", "beta2")),
        ("soap", ("beta1", "beta2")),
        ("muon", ("momentum",)),
        ("normuon", ("momentum", "beta2")),
        ("sf_adamw", ("schedule_free_beta", "beta2")),
        ("sf_normuon", ("schedule_free_beta", "beta2")),
        ("full_fusion", ("schedule_free_beta", "neuron_beta2")),
    ],
)
def test_betas_is_the_recipes_own_argument_of_that_name(name: str, names: tuple[str, ...]) -> None:
    assert betas_of(optim.RECIPES[name]()) == names
    if len(names) == 2:
        numbers = optim.RECIPES[name](betas=(0.5, 0.25)).hyperparameters
        assert tuple(numbers[n] for n in names) == (0.5, 0.25)


def test_a_plain_momentum_has_no_pair() -> None:
    assert betas_of(optim.chain(optim.scale_by_momentum(), optim.scale_by_learning_rate(0.1))) == ()


def one_cycle(optimizer: Any) -> Any:
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)


def cyclic(optimizer: Any) -> Any:
    return CyclicLR(optimizer, base_lr=1e-4, max_lr=1e-2, step_size_up=3)


@pytest.mark.parametrize("schedule", [one_cycle, cyclic])
def test_a_scheduler_that_cycles_momentum_cycles_adamws_beta1_as_in_torch(schedule: Any) -> None:
    found = []
    for ours in (True, False):
        model = mlp()
        optimizer: Any = made(model) if ours else torch.optim.AdamW(model.parameters())
        scheduler = schedule(optimizer)
        seen = []
        for batch in batches(8):
            train(model, optimizer, [batch], scheduler.step)
            seen.append(optimizer.param_groups[0]["betas"])
        found.append(seen)
    assert found[0] == found[1] and len({b for b, _ in found[0]}) > 3


@pytest.mark.parametrize("schedule", [one_cycle, cyclic])
def test_the_cycled_betas_are_those_of_the_step(schedule: Any) -> None:
    """Against the official Lion, which corrects no bias: AdamW's correction is here the product of the betas that were
    used, in torch the present one to the power of the count."""
    found = []
    for ours in (True, False):
        model = mlp()
        optimizer: Any = made(model, optim.lion()) if ours else Lion(model.parameters(), lr=1e-4)
        scheduler = schedule(optimizer)
        train(model, optimizer, batches(8), scheduler.step)
        found.append(model)
    close_to_torch(*found)


@pytest.mark.parametrize("schedule", [one_cycle, cyclic])
@pytest.mark.parametrize(("name", "first"), [("muon", "momentum"), ("normuon", "momentum"), ("sf_adamw", "schedule_f")])
def test_what_it_cycles_elsewhere_is_said_once(name: str, first: str, schedule: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 128), nn.Linear(128, 128), nn.Linear(128, 2))
    optimizer = made(model, name, **({} if name == "sf_adamw" else {"lr": optim.constant(0.01)}))
    scheduler = schedule(optimizer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, batches(3), scheduler.step)
    told = [str(w.message) for w in said if "betas was written" in str(w.message)]
    assert len(told) == 1 and f"its first is {first}" in told[0] and "cycle_momentum=False" in told[0]
    quiet = made(mlp(), "sf_adamw")
    OneCycleLR(quiet, max_lr=1e-2, total_steps=20, cycle_momentum=False)


def with_betas(model: nn.Module) -> list[dict[str, Any]]:
    plain = list(model.parameters())
    return [{"params": plain[:2], "betas": (0.5, 0.9)}, {"params": plain[2:]}]


def test_betas_of_a_group_and_written_later() -> None:
    model, reference = mlp(), mlp()
    optimizer, theirs = made(with_betas(model), optim.lion(lr=1e-3)), Lion(with_betas(reference), lr=1e-3)
    assert (optimizer.param_groups[0]["beta1"], optimizer.param_groups[0]["beta2"]) == (0.5, 0.9)
    for at, pair in ((0, (0.7, 0.8)), (1, (0.6, 0.99))):
        train(model, optimizer, batches(2))
        train(reference, theirs, batches(2))
        for o in (optimizer, theirs):
            o.param_groups[at]["betas"] = pair
    train(model, optimizer, batches(2))
    train(reference, theirs, batches(2))
    close_to_torch(model, reference)
    assert optimizer.param_groups[1]["beta2"] == 0.99
    optimizer.param_groups[1]["beta2"] = 0.5
    train(model, optimizer, batches(1))
    assert optimizer.param_groups[1]["betas"] == (0.6, 0.5), "the pair shows what counts"


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ((1.5, 0.9), ValueError, "'beta1' is 1.5"),
        (0.9, TypeError, "is not a pair"),
        ((0.9,), TypeError, "is not a pair"),
    ],
)
def test_a_wrong_pair_is_refused_at_the_step(value: Any, error: type[Exception], words: str) -> None:
    model = mlp()
    optimizer = made(model)
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["betas"] = value
    with pytest.raises(error, match=words):
        train(model, optimizer, batches(1))
    assert optimizer.param_groups[0]["beta1"] == 0.9 and optimizer.param_groups[0]["steps"] == 1


def test_a_checkpoint_from_before_the_pair_loads() -> None:
    model = mlp()
    optimizer = made(model, functools.partial(optim.adamw, betas=(0.5, 0.6)))
    train(model, optimizer, batches(1))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["betas"]
    fresh = made(mlp())
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["betas"] == (0.5, 0.6)


def test_words_that_say_nothing_go_and_those_that_mean_something_stay() -> None:
    told = {"lr": 1.0, "foreach": True, "fused": None, "capturable": True, "amsgrad": False, "maximize": True}
    assert without_torchs_words(told, "group") == {"lr": 1.0, "maximize": True}
    with pytest.raises(ValueError, match="group sets decoupled_weight_decay=False"):
        without_torchs_words({"decoupled_weight_decay": False}, "group")


def test_a_pair_beside_its_numbers() -> None:
    names = ("beta1", "beta2")
    assert split_betas({"betas": [0.9, 0.8], "beta1": 0.9}, names, "group") == {"beta1": 0.9, "beta2": 0.8}
    with pytest.raises(ValueError, match=r"of which beta1 is 0\.9, and beta1=0\.5; give it once"):
        split_betas({"betas": (0.9, 0.8), "beta1": 0.5}, names, "group")
    with pytest.raises(ValueError, match="it has only momentum; set momentum itself"):
        split_betas({"betas": (0.9, 0.8)}, ("momentum",), "group")


def test_a_decay_gets_the_name_that_it_has_for_a_groups_parameters() -> None:
    def told(group: dict[str, Any], used: set[str]) -> dict[str, Any]:
        decay_is_theirs(group, used)
        return group

    scalars = {"scalar_lr", "scalar_weight_decay"}
    assert told({"weight_decay": 0.0, "lr": 1.0}, scalars) == {"scalar_weight_decay": 0.0, "lr": 1.0}
    both = {"weight_decay": 0.0, "scalar_weight_decay": 0.1}
    assert told(dict(both), scalars) == both
    assert told({"weight_decay": 0.0}, {"weight_decay", *scalars}) == {"weight_decay": 0.0}
    assert told({"weight_decay": 0.0}, {"lr"}) == {"weight_decay": 0.0}


@pytest.mark.parametrize("recipe", ["muon", "normuon"])
def test_biases_and_norms_without_decay_as_trainers_group_them(recipe: str) -> None:
    """transformers' Trainer and timm give the matrices a decay and the rest none, whatever the recipe calls it."""
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128))
    decays = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = made(groups, functools.partial(optim.RECIPES[recipe], scalar_weight_decay=0.5), model=model)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[1]["scalar_weight_decay"] == 0.0
    before = [p.detach().clone() for p in rest]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(rest, before, strict=True))
