"""Loops over a torch optimizer of this package, and what its tests compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile.optim import Transform, as_torch_optimizer
from fusion_compile.optim._transform import Extras, Periodic
from fusion_compile.optim._tree import number_like
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import naming

SCHEDULE_FREE = tuple(n for n, recipe in optim.RECIPES.items() if recipe().gradient_point is not None)


def made(params: Any, transform: Any = "adamw", **options: Any) -> TorchOptimizer:
    return as_torch_optimizer(params, transform, **{"mode": "eager", **options})


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, each: Callable[[], Any] = lambda: None
) -> None:
    """The ordinary loop; `each` runs after each step."""
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        each()


def bowl_steps(model: nn.Module, optimizer: TorchOptimizer, steps: range) -> None:
    """The steps of the Bowl with these numbers, with their losses for recipes that ask for them."""
    for i in steps:
        optimizer.zero_grad()
        loss = loss_fn(model, *noise(i))
        loss.backward()
        optimizer.set_loss(loss)
        optimizer.step()


def trained_bowl(name: str, steps: int = 4, **options: Any) -> tuple[Bowl, TorchOptimizer]:
    model = Bowl()
    optimizer = made(model, name, **options)
    bowl_steps(model, optimizer, range(steps))
    return model, optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def close_to_torch(model: nn.Module, reference: nn.Module) -> None:
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        # a few roundings of fp32 (6e-8) on weights below 1, through a division by √v
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=naming(name))


def two_groups(model: nn.Module, named: bool = True) -> list[dict[str, Any]]:
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    strip = list if named else lambda pairs: [p for _, p in pairs]
    return [{"params": strip(decayed)}, {"params": strip(rest), "lr": 3e-3, "weight_decay": 0.0}]


def counting(first: bool, said: list[str]) -> Transform:
    """Moves by -1 where a step is due and by -0.25 else; its periodic work counts in the state, its first sets 100."""

    def init(params: Any) -> Any:
        return (number_like(params, 0.0),)

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return {k: torch.full_like(p, -1.0 if context.due else -0.25) for k, p in params.items()}, state

    def begin(state: Any, params: Any, context: Any) -> Any:
        said.append("first")
        return (state[0] + 100,)

    work = Periodic("count", 2, lambda state, params, context: (state[0] + 1,), begin if first else None)
    return Transform(init, update, Extras("counting", {"lr": 1.0}, periodic=(work,), period=3, descends=True))
