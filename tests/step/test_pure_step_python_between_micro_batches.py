"""Between two micro-batches Python is what it is in the ordinary loop: what the first part made is there, and gradients
that pass a hook have been divided."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_models import assert_same_weights, batches, compiled, mlp, squared_error

pytestmark = pytest.mark.filterwarnings("ignore:the step is captured by running it:UserWarning")

PARTS = 2
Program = Callable[[nn.Module], tuple[Callable[..., Tensor], Callable[[], Any]]]


def smallest_loss(_: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    """A record in a dictionary that is empty at first, and that nothing but the user reads."""
    record: dict[str, Tensor] = {}

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(m, x, y)
        record["best"] = torch.minimum(record.get("best", value.detach()), value.detach())
        return value

    return loss, lambda: record["best"]


def mean_that_is_none_at_first(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    """A reward's baseline in an attribute."""

    def loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        size = x.abs().mean()
        m.mean = size if m.mean is None else 0.9 * m.mean + 0.1 * size
        return squared_error(m, x / m.mean, y)

    model.mean = None  # type: ignore[assignment]
    return loss, lambda: model.mean


def last_two(_: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    """A queue of the last two losses, of which the second program reads the mean."""
    kept: deque[Tensor] = deque([torch.zeros(())], maxlen=2)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(m, x, y)
        kept.append(value.detach())
        return value + 0.1 * torch.stack(list(kept)).mean() * value

    return loss, lambda: torch.stack(list(kept))


def clipped_activations(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    """A tensor's hook that clips, and keeps what it saw."""
    seen: dict[str, Tensor] = {}

    def clip(gradient: Tensor) -> Tensor:
        seen["gradient"] = gradient.detach()
        return gradient.clamp(-2e-3, 2e-3)

    def loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = m[0](x)
        hidden.register_hook(clip)
        return (m[2](m[1](hidden)) - y).square().mean()

    return loss, lambda: seen["gradient"]


def backward_hook(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    """A module's full backward hook, which scales by a norm."""

    def scaled(module: nn.Module, _: Any, of_output: Any) -> Any:
        return tuple(None if g is None else g / (1e-3 + g.norm()) for g in _)

    model.get_submodule("2").register_full_backward_hook(scaled)
    return squared_error, lambda: torch.zeros(())


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-2e-3, 2e-3)


def custom_backward(_: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    """An autograd function, which Dynamo reads."""

    def loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return (m[2](m[1](Clipped.apply(m[0](x)))) - y).square().mean()

    return loss, lambda: torch.zeros(())


PROGRAMS: list[Program] = [
    *(smallest_loss, mean_that_is_none_at_first, last_two),
    *(clipped_activations, backward_hook, custom_backward),
]
WAYS: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "captured": {"backend": "aot_eager"}}
DATA = batches(3)


def ordinary(program: Program) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The ordinary loop over the parts of each batch; the losses, and what is kept after each step."""
    model = mlp()
    loss, kept = program(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.01)
    losses, states = [], []
    for batch in DATA:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in zip(*(t.chunk(PARTS) for t in batch), strict=True):
            value = loss(model, *part) / PARTS
            value.backward()
            total = total + value.detach()
        optimizer.step()
        losses.append(total)
        states.append(kept().clone())
    return model, losses, states


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_part_finds_what_the_one_before_left_and_hooks_see_its_gradient(program: Program, way: str) -> None:
    reference, losses, states = ordinary(program)
    model = mlp()
    loss, kept = program(model)
    step = compiled(model, loss, lr=1e-2, accumulate=PARTS, **WAYS[way])
    step.hyperparameters["eps"] = 1e-4
    for batch, wanted, state in zip(DATA, losses, states, strict=True):
        # fp32 sums in another order: a few units of 2^-24 in a loss, carried on by three steps of 1e-2.
        torch.testing.assert_close(step(*batch), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept(), state, rtol=1e-5, atol=1e-6)
    assert_same_weights(model, reference, rtol=1e-4, atol=2e-6)
