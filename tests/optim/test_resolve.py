"""What counts as an optimizer, and what is refused with which words. A direction without a step would train uphill."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion_compile import compile_training_step, optim
from fusion_compile.optim import Extras, Transform
from fusion_compile.optim._resolve import refuse_without_step, resolve_optimizer

PARTS: dict[str, Transform] = {
    "scale_by_adam": optim.scale_by_adam(),
    "scale_by_rms": optim.scale_by_rms(),
    "scale_by_lion": optim.scale_by_lion(),
    "scale_by_momentum": optim.scale_by_momentum(),
    "scale_by_mona": optim.scale_by_mona(),
    "scale_by_soap": optim.scale_by_soap(),
    "scale_by_kl_soap": optim.scale_by_kl_soap(),
    "scale_by_shampoo": optim.scale_by_shampoo(),
    "scale_by_kl_shampoo": optim.scale_by_kl_shampoo(),
    "scale_by_layer": optim.scale_by_layer({}),
    "scale_by_shape": optim.scale_by_shape(),
    "orthogonalize": optim.orthogonalize(),
    "normalize_neurons": optim.normalize_neurons(),
    "clip_by_global_norm": optim.clip_by_global_norm(),
    "add_decayed_weights": optim.add_decayed_weights(),
    "add_cautious_weight_decay": optim.add_cautious_weight_decay(),
}
WRAPPERS: dict[str, Any] = {
    "snr_gate": lambda base: optim.snr_gate(base, mode="element"),
    "measured": lambda base: optim.measured(base, "size"),
    "autoscale": lambda base: optim.autoscale(base, names=["beta2"], d0=1.0),
    "scale_lr_by_loss_ratio": lambda base: optim.scale_lr_by_loss_ratio(base, names=["beta2"]),
    "schedule_free": optim.schedule_free,
    "schedule_free_plus": lambda base: optim.schedule_free_plus(base, optim.Named("beta2", 0.999)),
    "scale_by_shampoo": lambda base: optim.scale_by_shampoo(base=base),
    "scale_by_kl_shampoo": lambda base: optim.scale_by_kl_shampoo(base=base),
}


def own(**extras: Any) -> Transform:
    return Transform(lambda params: optim.EmptyState(), lambda u, s, p, c: (u, s), Extras("own", **extras))


def test_a_name_a_transform_and_a_callable_are_optimizers() -> None:
    adamw = optim.adamw()
    assert resolve_optimizer(adamw) is adamw
    assert resolve_optimizer("soap").name == "soap" and resolve_optimizer(optim.lion).name == "lion"
    assert resolve_optimizer(partial(optim.adamw, 0.5)).hyperparameters["lr"] == 0.5
    assert resolve_optimizer(own(descends=True)).name == "own"


def test_every_recipe_takes_a_step() -> None:
    assert all(make().descends for make in optim.RECIPES.values())
    assert optim.fusion().descends and optim.fusionopt_compat().descends and optim.hyperball().descends


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("adam", ValueError, r"optimizer='adam' is not a recipe; use one of adamw, lion, .*Did you mean 'adamw'\?"),
        ("scale_by_soap", ValueError, "is not a recipe; use one of .*, soap, "),
        (3, TypeError, "optimizer is a int; give a recipe's name"),
        (torch.optim.SGD, TypeError, r"optimizer is the class SGD; .*a torch\.optim\.Optimizer cannot be captured"),
        (torch.optim.SGD(nn.Linear(1, 1).parameters()), TypeError, "optimizer is a SGD"),
        (lambda: 1e-3, TypeError, "optimizer=.*<lambda> returned a float; it must return a Transform"),
        (optim.scale_by_adam, ValueError, "scale_by_adam takes no step"),
    ],
)
def test_anything_else_is_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve_optimizer(given)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_without_a_step_is_refused_and_a_chain_with_one_is_not(name: str) -> None:
    part = PARTS[name]
    message = rf"{name} takes no step.*chain\({name}, scale_by_learning_rate\(1e-3\)\)"
    for alone in (part, optim.chain(part, name=name), optim.partition({"scalar": part}, name=name)):
        with pytest.raises(ValueError, match=message):
            resolve_optimizer(alone)
    stepped = optim.chain(part, optim.scale_by_learning_rate(1e-3))
    assert resolve_optimizer(stepped) is stepped
    refuse_without_step(optim.partition({"scalar": stepped}))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_takes_a_step_if_its_base_does(name: str) -> None:
    base = optim.scale_by_adam()
    stepped = optim.chain(base, optim.scale_by_learning_rate(1e-3))
    assert not WRAPPERS[name](base).descends and WRAPPERS[name](stepped).descends


def test_a_transform_of_ones_own_works_in_a_chain_and_alone_if_it_says_that_it_takes_a_step() -> None:
    with pytest.raises(ValueError, match=r"own takes no step.*Extras\(descends=True\)"):
        resolve_optimizer(own())
    assert resolve_optimizer(optim.chain(own(), optim.scale_by_learning_rate(1e-3))).descends


def test_the_step_refuses_before_it_touches_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 128), nn.Linear(128, 128), nn.Linear(128, 2))
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    for bad in (optim.scale_by_rms(), optim.scale_by_soap(), optim.schedule_free(optim.scale_by_rms())):
        with pytest.raises(ValueError, match="takes no step"):
            compile_training_step(model, lambda m, x: F.mse_loss(m(x), 0 * m(x)), optimizer=bad, mode="eager")
        with pytest.raises(ValueError, match="takes no step"):
            optim.as_torch_optimizer(model, bad, mode="eager")
    assert all(p is before[n][0] and p.data_ptr() == before[n][1] for n, p in model.named_parameters())
