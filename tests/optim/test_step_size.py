"""Parts shared by transforms that choose the step size."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim._step_size import check_rates, multiplied, with_rates


def test_rates_that_the_base_does_not_read_are_named() -> None:
    adamw = optim.adamw()
    check_rates("autoscale", adamw, ["lr", "weight_decay"])
    with pytest.raises(
        ValueError, match=r"autoscale\(\) changes the rates 'scalar_lr', but adamw reads 'beta1', 'beta2'"
    ):
        check_rates("autoscale", adamw, ["scalar_lr"])
    with pytest.raises(ValueError, match="changes the rates of no name"):
        check_rates("autoscale", adamw, [])
    with pytest.raises(ValueError, match="scale_by_shape reads no hyperparameter"):
        check_rates("autoscale", optim.scale_by_shape(), ["lr"])


def test_a_context_with_other_rates_leaves_the_given_one_alone() -> None:
    given = optim.Context({"lr": torch.tensor(0.5), "eps": torch.tensor(2.0)}, torch.tensor(3.0), due=True)
    changed = multiplied(given, ["lr"], torch.tensor(4.0))
    assert {n: float(v) for n, v in changed.hyperparameters.items()} == {"lr": 2.0, "eps": 2.0}
    assert changed.loss is given.loss and changed.due
    assert float(with_rates(given, {"lr": torch.tensor(7.0)}).hyperparameters["lr"]) == 7.0
    assert float(given.hyperparameters["lr"]) == 0.5
