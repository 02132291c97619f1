"""Which numbers a transform uses is found without data and without a step."""

from __future__ import annotations

from typing import Any

import torch

from fusion_compile import optim
from fusion_compile._step.numbers_used import numbers_used
from fusion_compile.optim import Transform
from fusion_compile.optim._transform import EmptyState, Extras


def test_a_partition_uses_the_numbers_of_the_banks_that_it_is_given() -> None:
    muon = optim.muon()
    scalar = numbers_used(muon, {"scalar/float32": torch.zeros(4)})
    spectral = numbers_used(muon, {"spectral/8x8/float32": torch.zeros(2, 8, 8)})
    assert scalar == frozenset({"scalar_lr", "scalar_beta1", "scalar_beta2", "scalar_eps", "scalar_weight_decay"})
    assert spectral is not None and {"lr", "weight_decay"} <= spectral and not scalar & spectral


def test_numbers_of_the_gradient_point_count_and_handing_one_on_does_not() -> None:
    used = numbers_used(optim.sf_adamw(), {"scalar/float32": torch.zeros(4)})
    assert used is not None and {"schedule_free_beta", "lr", "beta2"} <= used

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        numbers = {**context.hyperparameters}  # as a wrapper does
        return {k: u * numbers["a"] for k, u in updates.items()}, state

    handing_on = Transform(lambda params: EmptyState(), update, Extras(hyperparameters={"a": 1.0, "b": 2.0}))
    assert numbers_used(handing_on, {"scalar/float32": torch.zeros(4)}) == frozenset({"a"})


def test_a_transform_that_needs_values_is_not_judged() -> None:
    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return {k: u * float(u.sum()) for k, u in updates.items()}, state

    transform = Transform(lambda params: EmptyState(), update, Extras(hyperparameters={"lr": 1.0}))
    assert numbers_used(transform, {"scalar/float32": torch.zeros(4)}) is None
