"""The recipes as classes: what registries, trainers and harnesses do with an optimizer's class."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile.optim import as_torch_optimizer
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import Bowl
from tests.small_models import batches, mlp
from tests.torch_loops import bowl_steps, close_to_torch, equal, made, train, weights

CLASSES: dict[str, Any] = {
    "adamw": optim.AdamW,
    "lion": optim.Lion,
    "sf_adamw": optim.SFAdamW,
    "muon": optim.Muon,
    "normuon": optim.NorMuon,
    "sf_normuon": optim.SFNorMuon,
    "soap": optim.SOAP,
    "full_fusion": optim.FullFusion,
}


def test_every_recipe_has_a_class_whose_name_a_registry_can_split() -> None:
    assert CLASSES.keys() == optim.RECIPES.keys()
    for cls in CLASSES.values():
        assert issubclass(cls, torch.optim.Optimizer) and "_" not in cls.__name__
        assert getattr(importlib.import_module("fusion_compile.optim"), cls.__name__) is cls


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_recipe_whatever_it_is_given(name: str) -> None:
    """The model, named parameters, and plain parameters beside the model: one trajectory."""
    found = []
    for given in ("recipe", "model", "named", "plain"):
        model = Bowl()
        params: Any = {"named": model.named_parameters(), "plain": model.parameters()}.get(given, model)
        if given == "recipe":
            optimizer: TorchOptimizer = made(model, name)
        else:
            optimizer = CLASSES[name](params, mode="eager", **({"model": model} if given == "plain" else {}))
        bowl_steps(model, optimizer, range(3))
        found.append(weights(model))
    # Names alone tell less than the model: a convolution is then elementwise.
    assert equal(found[0], found[1]) and equal(found[0], found[3])
    assert equal(found[0], found[2]) or not all(p.ndim < 3 for p in Bowl().parameters())


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", ["muon", "normuon", "sf_normuon", "soap", "full_fusion"])
def test_plain_parameters_of_a_matrix_recipe_are_routed_by_shape_with_one_warning(name: str, groups: bool) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 130), nn.Linear(130, 4))
    params: Any = list(model.parameters())
    with pytest.warns(UserWarning, match=rf"has parameters without names, and {name} .*Give the model") as said:
        split = [{"params": params[:2]}, {"params": params[2:]}] if groups else params
        optimizer = CLASSES[name](split, mode="eager")
    assert len(said) == 1
    model(torch.ones(2, 128)).sum().backward()
    optimizer.set_loss(1.0)
    optimizer.step()
    assert [r.role for r in optimizer.routes] == ["spectral", "scalar"] * 2 + ["scalar"] * 2


def test_options_of_the_recipe_and_torchs_words() -> None:
    model, reference = mlp(), mlp()
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    torchs: dict[str, Any] = {
        "foreach": None,
        "fused": True,
        "capturable": False,
        "amsgrad": False,
        "differentiable": False,
    }
    optimizer = optim.AdamW(model.parameters(), 1e-2, mode="eager", **options, **torchs)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, **options)
    train(model, optimizer, batches(4))
    train(reference, theirs, batches(4))
    close_to_torch(model, reference)
    assert optimizer.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"amsgrad": True}, ValueError, "AdamW sets amsgrad=True, which no recipe has"),
        ({"differentiable": True}, ValueError, "differentiable=True"),
        ({"ns_steps": 5}, TypeError, r"AdamW: .*unexpected .*'ns_steps'; its options are those of optim\.adamw"),
        ({"betas": (1.5, 0.9)}, ValueError, "beta1 is 1.5, but the decay of an average"),
        ({"lr": -1.0}, ValueError, "a negative rate goes uphill"),
    ],
)
def test_what_asks_for_another_optimizer_is_refused(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        optim.AdamW(mlp().parameters(), mode="eager", **options)


@pytest.mark.parametrize("name", ["adamw", "sf_normuon"])
def test_it_is_pickled_and_copied_with_its_class(name: str) -> None:
    model = Bowl()
    optimizer = CLASSES[name](model, lr=1e-2, mode="eager", weight_decay=0.1)
    bowl_steps(model, optimizer, range(2))
    optimizer.eval()
    for again, other in (pickle.loads(pickle.dumps((model, optimizer))), copy.deepcopy((model, optimizer))):
        assert type(other) is CLASSES[name] and other.param_groups[0]["weight_decay"] == 0.1
        for m, o in ((again, other), (copy.deepcopy((model, optimizer)))):
            o.train()
            bowl_steps(m, o, range(2, 4))
            o.eval()
        assert not equal(weights(again), weights(model))


@pytest.mark.parametrize("per_group", [False, True])
def test_uphill_is_torchs_maximize(per_group: bool) -> None:
    option = {"maximize": True}
    found = []
    classes: list[Any] = [(optim.AdamW, {"mode": "eager"}), (torch.optim.AdamW, {})]
    for cls, more in classes:
        model = mlp()
        plain: Any = list(model.parameters())
        params = [{"params": plain, **option}] if per_group else plain
        optimizer: Any = cls(params, lr=1e-2, **more, **({} if per_group else option))
        train(model, optimizer, batches(3))
        found.append(model)
    close_to_torch(*found)


def test_a_harness_that_reads_signatures_finds_what_it_looks_for() -> None:
    """As timm and Lightning's command line, which look for ``lr`` among the arguments."""
    names = inspect.signature(optim.SFNorMuon).parameters
    assert list(names)[:2] == ["params", "lr"] and "model" in names


def test_groups_copied_from_an_optimizer_of_torch() -> None:
    reference = mlp()
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.8, 0.95))
    model = mlp()
    copied = [{**g, "params": list(model.parameters())} for g in theirs.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = as_torch_optimizer(copied, "adamw", mode="eager")
    train(model, optimizer, batches(3))
    train(reference, theirs, batches(3))
    close_to_torch(model, reference)
