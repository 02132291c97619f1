"""Optimizers from plain dictionaries: every name, schedules, dataclasses, and what is not known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim import _registry
from tests.small_models import batches, mlp, squared_error


def test_every_recipe_is_there_and_can_be_made() -> None:
    assert set(optim.RECIPES) <= set(_registry.names())
    for name in _registry.names():
        if name != "fusion":  # needs its components
            assert isinstance(optim.create(name), optim.Transform)


def test_options_are_what_a_file_can_say() -> None:
    config = {
        "name": "muon",
        "lr": {"schedule": "wsd", "peak": 0.02, "total_steps": 100, "warmup_steps": 10, "tail": "sqrt"},
        "scalar_betas": [0.9, 0.99],
    }
    made = optim.create(config, weight_decay=0.2)
    assert made.hyperparameters["lr"] == optim.wsd(0.02, 100, 10, tail="sqrt")
    assert made.hyperparameters["scalar_beta2"] == 0.99 and made.hyperparameters["weight_decay"] == 0.2
    assert config["name"] == "muon"  # the dictionary is as it was
    named = optim.create("adamw", lr={"name": "head_lr", "value": 1e-4})
    assert named.hyperparameters["head_lr"] == 1e-4

    @dataclass
    class Config:
        name: str = "adakaon"
        momentum: str = "int8"
        weight_decay: float = 0.1

    assert optim.create(Config()).extras.stored == {"mu": "int8"}


def test_a_registered_name_is_an_optimizer_everywhere() -> None:
    def half_sgd(lr: float = 0.5) -> optim.Transform:
        return optim.chain(optim.scale_by_learning_rate(lr), name="half_sgd")

    optim.register("half_sgd", half_sgd)
    optim.register("half_sgd", half_sgd)  # twice the same says nothing new
    try:
        step = fc.compile_training_step(mlp(), squared_error, optimizer="half_sgd", mode="eager")
        step(*batches(1)[0])
        assert step.hyperparameters["lr"] == 0.5 and optim.create("half_sgd", lr=0.1).hyperparameters["lr"] == 0.1
        with pytest.raises(ValueError, match="'half_sgd' is taken"):
            optim.register("half_sgd", optim.adamw)
    finally:
        del _registry._KNOWN["half_sgd"]
    assert _registry.factory_of("half_sgd") is None
    step = fc.compile_training_step(mlp(), squared_error, optimizer="prodigy", mode="eager")
    assert step.transform.name == "prodigy"


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"'adakaom' is not an optimizer; .* Did you mean 'adakaon'"):
        optim.create("adakaom")
    with pytest.raises(ValueError, match=r"adakaon has no option 'beta'; it has lr, betas"):
        optim.create("adakaon", beta=0.9)
    with pytest.raises(ValueError, match=r"lr has the schedule 'poly'; use one of constant, cosine"):
        optim.create("lion", lr={"schedule": "poly"})
    with pytest.raises(ValueError, match=r"schedule 'cosine': .*total_steps"):
        optim.create("lion", lr={"schedule": "cosine", "peak": 1.0})
    with pytest.raises(ValueError, match=r"lr=\{'peak': 1\} is no number"):
        optim.create("lion", lr={"peak": 1})
    with pytest.raises(TypeError, match="give a name, or a dictionary with 'name'"):
        optim.create({"lr": 1.0})
    with pytest.raises(TypeError, match="a function that makes a Transform"):
        optim.register("x", optim.lion())  # type: ignore[arg-type]
