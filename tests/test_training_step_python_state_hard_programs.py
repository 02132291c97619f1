"""Harder programs: checkpointing of all kinds, hooks, custom functions, an optimizer in the loss, gradients in it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.testing import assert_close

from tests.python_state import STEPS, Training, around, layered, ordinary, through_a_step
from tests.small_models import PROGRAMS, mlp, squared_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:the step is captured by running it"),
    pytest.mark.filterwarnings("ignore:this step ran uncaptured"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # torch's own, of its fakes
]
Make = Callable[[], Training]
HARD: dict[str, Make] = {}


def hard(make: Make) -> Make:
    HARD[make.__name__] = make
    return make


@hard
def reentrant_checkpointing_with_dropout() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        return checkpointing.checkpoint(lambda z: F.dropout(self.linear(z), 0.3), x, use_reentrant=True)

    return layered(run, linear=nn.Linear(8, 8))


@hard
def checkpoints_in_one_another() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        def outer(z: Tensor) -> Tensor:
            return self.b(checkpointing.checkpoint(self.a, z, use_reentrant=False))

        return checkpointing.checkpoint(outer, x, use_reentrant=False)

    return layered(run, a=nn.Linear(8, 8), b=nn.Linear(8, 8))


@hard
def a_mean_kept_inside_a_checkpoint() -> Training:
    """Counted twice for each step, as the recomputation runs the forward again."""

    def inner(self: Any, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x) - self.mean

    def run(self: Any, x: Tensor) -> Tensor:
        return checkpointing.checkpoint(lambda z: inner(self, z), x, use_reentrant=False)

    return layered(run, "mean", mean=torch.zeros(8), linear=nn.Linear(8, 8))


@hard
def a_forward_hook_that_keeps_features() -> Training:
    kept: dict[str, Tensor] = {}
    model = mlp()
    model[1].register_forward_hook(lambda module, given, out: kept.__setitem__("features", out))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(model, x, y)
        return value + 0.1 * kept["features"].square().mean()

    return Training(model, loss)


@hard
def a_gradient_penalty() -> Training:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.requires_grad_()
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, y) + gradient.square().mean()

    return Training(mlp(), loss)


@hard
def a_loss_at_perturbed_weights() -> Training:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        gradients = torch.autograd.grad(squared_error(model, x, y), list(model.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        moved = {n: p + 0.05 * g / norm for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, moved, (x,)), y)

    return Training(mlp(), loss)


@hard
def a_shadow_of_the_weights_in_the_loss() -> Training:
    model = mlp()
    shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wanted = torch.func.functional_call(model, shadow, (x + 0.1,)).detach()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shadow[name].mul_(0.9).add_(parameter, alpha=0.1)
        return squared_error(model, x, y) + F.mse_loss(model(x), wanted)

    return Training(model, loss, look=lambda: shadow)


@hard
def old_weight_norm() -> Training:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    return Training(around(layer))


@hard
def a_parameter_in_a_list_outside() -> Training:
    model: Any = mlp()
    decayed = [model[0].weight]
    return Training(
        model, lambda model, x, y: squared_error(model, x, y) + 0.1 * sum(p.square().sum() for p in decayed)
    )


@hard
def a_buffer_registered_by_the_first_forward() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.arange(8.0).sin(), persistent=False)
        return x + self.positions

    return layered(run)


@hard
def a_recurrent_state() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        before = self.hidden if self.hidden is not None else torch.zeros(len(x), 8)
        hidden = self.cell(x, before)
        self.hidden = hidden.detach()
        return hidden

    return layered(run, "hidden", hidden=None, cell=nn.GRUCell(8, 8))


@hard
def a_small_penalty_on_a_parameter_outside() -> Training:
    """Too small for the proof of the first steps, and what AdamW makes of its gradient is not."""
    model: Any = mlp()
    decayed = [model[2].bias]
    return Training(model, lambda model, x, y: squared_error(model, x, y) + 1e-3 * sum(p.abs().sum() for p in decayed))


@hard
def a_buffer_in_a_closure() -> Training:
    model = around(nn.BatchNorm1d(8, affine=False))
    model[0].requires_grad_(False)  # before a norm the gradient of a bias is zero up to rounding
    mean = model.get_buffer("1.running_mean")
    return Training(model, lambda model, x, y: F.mse_loss(model(x) + mean.sum(), y))


@hard
def a_descriptor_that_dynamo_cannot_guard() -> Training:
    seen = {"read": False}

    class Scale:
        def __get__(self, owner: Any, kind: type) -> float:
            seen["read"] = True
            return 2.0

    class Trainer:
        scale = Scale()

        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return self.scale * squared_error(model, x, y)

    return Training(mlp(), Trainer().loss, look=lambda: seen["read"])


@hard
def a_table_as_long_as_the_training() -> Training:
    """In the last step the loss cannot run twice in a row."""
    trainer = types.SimpleNamespace(step=0, weights=torch.linspace(1.0, 0.1, STEPS))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weight = trainer.weights[trainer.step]
        trainer.step += 1
        return weight * squared_error(model, x, y)

    return Training(mlp(), loss, look=lambda: trainer.step)


@pytest.mark.parametrize("way", PROGRAMS)
@pytest.mark.parametrize("name", HARD)
def test_it_is_the_ordinary_loop(name: str, way: str) -> None:
    """Two runs add in another order, so float32 rounding is allowed for: assert_close's 1.3e-6 and 1e-5."""
    expected_training, expected = ordinary(HARD[name])
    training, seen = through_a_step(HARD[name], **PROGRAMS[way])
    assert_close(seen, expected)
    assert_close(dict(training.model.state_dict()), dict(expected_training.model.state_dict()))
