"""Loading a torch optimizer's state: all is checked before anything is changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from fusion_compile import optim
from tests.small_models import batches, mlp
from tests.torch_loops import equal, made, train


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("lr", -1.0, ValueError),
        ("lr", None, TypeError),
        ("lr", "fast", TypeError),
        ("beta1", math.nan, ValueError),
        ("eps", -1.0, ValueError),
        ("steps", -1, ValueError),
        ("steps", "many", ValueError),
    ],
)
def test_a_checkpoint_with_a_wrong_number_changes_nothing(key: str, value: Any, error: type[Exception]) -> None:
    model = mlp()
    optimizer = made(model, optim.adamw(lr=1e-2))
    train(model, optimizer, batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(3)[2:])
    kept = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(error, match=rf"the checkpoint is wrong, and nothing was loaded: .*{key}"):
        optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    for index, parts in kept["state"].items():
        assert equal(parts, now["state"][index])
