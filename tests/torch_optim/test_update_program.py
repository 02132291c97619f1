"""The update as programs: the loss it needs, due steps, periodic work, autocast around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile.optim import Transform, as_torch_optimizer
from fusion_compile.optim._transform import EmptyState, Extras
from tests.data.bowl import Bowl, loss_fn, noise
from tests.torch_loops import (
    counting,
    equal,
    made,
    weights,
)


def loss_sized() -> Transform:
    """Minus the loss times the gradient; it cannot do without the loss."""

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        if context.loss is None:
            raise ValueError("no loss")
        return {k: -context.loss * u for k, u in updates.items()}, state

    return Transform(lambda params: EmptyState(), update, Extras("loss_sized", {"lr": 1.0}, descends=True))


@pytest.mark.parametrize("options", [{"mode": "eager"}, {"backend": "aot_eager"}])
def test_a_transform_that_needs_the_loss(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = as_torch_optimizer([p], loss_sized(), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.1 * p.sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == pytest.approx(0.3)
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.3 * 0.1))
    optimizer.set_loss(2.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.3 * 0.1 - 2 * 0.1))
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"loss_sized cannot take a step without the loss.*set_loss"):
        optimizer.step()  # the loss of the step before does not count for this one
    assert torch.equal(p, before) and optimizer.param_groups[0]["steps"] == 2


def test_schedule_free_plus_takes_the_loss() -> None:
    plus = pytest.importorskip("fusion_compile.optim.schedule_free_plus").schedule_free_plus
    model = Bowl()
    optimizer = made(model, plus(optim.chain(optim.scale_by_rms(0.999, 1e-8), optim.scale_by_learning_rate(1.0))))
    loss_fn(model, *noise(0)).backward()
    with pytest.raises(RuntimeError, match="cannot take a step without the loss"):
        optimizer.step()
    before = weights(model)
    optimizer.set_loss(loss_fn(model, *noise(0)))
    optimizer.step()
    assert not equal(weights(model), before)


@pytest.mark.parametrize("options", [{"mode": "eager"}, {"backend": "aot_eager"}])
@pytest.mark.parametrize("first", [True, False])
def test_due_steps_and_periodic_work(first: bool, options: dict[str, Any]) -> None:
    said: list[str] = []
    p = nn.Parameter(torch.zeros(3))
    optimizer = as_torch_optimizer([p], counting(first, said), **options)
    for _ in range(7):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.tolist() == [-(3 * 1 + 4 * 0.25)] * 3  # due: steps 0, 3, 6
    assert float(optimizer.state[p]["0"]) == (100 if first else 1) + 3  # after steps 1, 3, 5, 7
    assert said == ["first"] * first
    assert len(optimizer._inside.programs) == 3


def test_a_step_inside_autocast_is_the_same_step() -> None:
    models = [Bowl(), Bowl()]
    for model, enabled in zip(models, (False, True), strict=True):
        optimizer = made(model, optim.muon(matmul_dtype=torch.float32), mode=None, backend="aot_eager")
        for i in range(3):
            optimizer.zero_grad()
            loss_fn(model, *noise(i)).backward()
            with torch.autocast("cpu", enabled=enabled and i > 0):
                optimizer.step()
        assert len(optimizer._inside.programs) == 1
    assert equal(weights(models[0]), weights(models[1]))
