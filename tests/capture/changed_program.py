"""Programs that are changed between two calls: what is changed, and the name by which it should be noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Program:
    """`change` is done between two calls; `label` is what it changes."""

    loss: Callable[..., Tensor]
    change: Callable[[], Any]
    label: str
    model: nn.Module


PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(make: Callable[[], Program]) -> Callable[[], Program]:
    PROGRAMS[make.__name__] = make
    return make


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def around(part: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 2))


def of_model(part: nn.Module, change: Callable[[Any], Any], label: str) -> Program:
    """The model's middle is changed."""
    model = around(part)
    return Program(plain_loss, lambda: change(model[1]), label, model)


def of_loss(term: Callable[[Tensor], Any], change: Callable[[], Any], label: str) -> Program:
    """The loss has a further factor; something that it reads is changed."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        return F.mse_loss(out, y) * term(out)

    return Program(loss, change, label, around(nn.Tanh()))


class Part(nn.Module):
    """Has whatever attributes it is given."""

    factor = 1.0

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.compute = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)
