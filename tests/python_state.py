"""Small training programs whose Python keeps something from one step to the next, by kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.small_models import batches, compiled, squared_error

STEPS = 5
Batches = list[tuple[Any, ...]]


@dataclass
class Training:
    """One program: what is trained, and what is looked at after each step.

    `between`: called with the number of steps taken, after each. `options`: of the compiled step.
    """

    model: nn.Module
    loss: Callable[..., Any] = squared_error
    look: Callable[[], Any] = lambda: ()
    between: Callable[[int], object] = lambda taken: None
    data: Batches = field(default_factory=lambda: [*batches(STEPS)])
    accumulate: int = 1


class Layer(nn.Module):
    """A module whose forward is `run(self, x)`, with attributes."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def around(layer: nn.Module) -> nn.Sequential:
    """4 -> 8, `layer`, 8 -> 2."""
    return nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2))


def layered(run: Callable[[Any, Tensor], Tensor], *look: str, **attributes: Any) -> Training:
    """A program around one `Layer` whose attributes `look` are looked at."""
    layer = Layer(run, **attributes)
    return Training(around(layer), look=lambda: [getattr(layer, name) for name in look])


def ordinary(make: Callable[[], Training]) -> tuple[Training, list[Any]]:
    """The program in the ordinary loop, and what was seen: losses and looks."""
    torch.manual_seed(0)
    training = make()
    optimizer = torch.optim.AdamW(p for p in training.model.parameters() if p.requires_grad)
    seen = []
    torch.manual_seed(1)
    for taken, batch in enumerate(training.data, 1):
        optimizer.zero_grad()
        total = torch.zeros(())
        for i in range(training.accumulate):
            part = tuple(t.chunk(training.accumulate)[i] for t in batch)
            loss = training.loss(training.model, *part) / training.accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        seen.append([total, copied(training.look())])
        training.between(taken)
    return training, seen


def through_a_step(make: Callable[[], Training], **options: Any) -> tuple[Training, list[Any]]:
    """The same through a compiled step."""
    torch.manual_seed(0)
    training = make()
    step = compiled(training.model, training.loss, accumulate=training.accumulate, **options)
    seen = []
    torch.manual_seed(1)
    for taken, batch in enumerate(training.data, 1):
        seen.append([step(*batch), copied(training.look())])
        training.between(taken)
    return training, seen


def copied(value: Any) -> Any:
    """`value` with tensors copied; a deque or tuple is a list."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return copy.copy(value)
    return [copied(inner) for inner in value]
