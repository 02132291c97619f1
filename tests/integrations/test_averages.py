"""The averages for a while, behind whatever a trainer wraps around an optimizer."""

from __future__ import annotations

import pytest
import torch

from fusion_compile.integrations._averages import averaged, kept, of_schedule_free
from tests.small_models import batches, mlp
from tests.torch_loops import equal, made, train, weights


class Wrapped:
    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def test_inside_the_parameters_hold_x_and_afterwards_what_they_held() -> None:
    model = mlp()
    optimizer = made(model, "sf_adamw")
    train(model, optimizer, batches(3))
    y = weights(model)
    with averaged([Wrapped(Wrapped(optimizer)), torch.optim.SGD(mlp().parameters()), None]):
        x = weights(model)
        assert equal(x, {n: optimizer.state[p]["x"] for n, p in model.named_parameters()})
        saved = kept(model.state_dict())
    assert equal(weights(model), y) and not equal(x, y) and equal(saved, x)
    optimizer.eval()
    with averaged([optimizer]):
        pass
    assert equal(weights(model), x), "it was in eval mode before"
    optimizer.train()
    with pytest.raises(ZeroDivisionError), averaged([optimizer]):
        1 / 0  # noqa: B018 - a save that fails
    assert equal(weights(model), y)


def test_only_optimizers_that_move_the_gradient_point_are_found() -> None:
    moving, still = made(mlp(), "sf_adamw"), made(mlp(), "adamw")
    assert of_schedule_free([Wrapped(moving), still, None, torch.optim.SGD(mlp().parameters())]) == [moving]
