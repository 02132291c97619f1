"""What is fixed about a step's update: the transform knows its banks, and what does not fit together is refused."""

from __future__ import annotations

import pytest
from torch import nn

from fusion_compile import optim
from fusion_compile._step.planned import Forced, plan_update
from fusion_compile._step.pure_step import CLIP
from tests.small_models import mlp


def test_numbers_of_the_recipe_the_groups_and_the_step_are_joined() -> None:
    group = {"params": ["bias$"], "weight_decay": 0.0, "name": "biases"}
    planned = plan_update(mlp(), "adamw", 1e-2, [group], None, Forced())
    assert (planned.numbers["lr"], planned.numbers[CLIP]) == (1e-2, float("inf"))
    assert planned.numbers["biases.weight_decay"] == 0.0
    assert {(r.name, r.group) for r in planned.routes} == {
        ("0.weight", "default"),
        ("0.bias", "biases"),
        ("2.weight", "default"),
        ("2.bias", "biases"),
    }
    assert len(planned.layout.banks) == 2


def test_forced_roles_reach_the_banks() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    planned = plan_update(model, "muon", None, (), 1.0, Forced(spectral=[r"^1\.weight"]))
    assert [bank.matrix for bank in planned.layout.banks] == [None, (8, 8)]
    assert planned.numbers[CLIP] == 1.0


def test_a_rate_that_no_parameter_reads_and_a_second_bound_are_refused() -> None:
    with pytest.raises(ValueError, match="lr"):
        plan_update(mlp(), "muon", 1e-2, (), None, Forced())  # no matrix is large enough, and the rest has a scalar_lr
    bounded = optim.chain(optim.clip_by_global_norm(optim.Named(CLIP, 1.0)), optim.adamw())
    with pytest.raises(ValueError, match="would be silent"):
        plan_update(mlp(), bounded, None, (), None, Forced())
