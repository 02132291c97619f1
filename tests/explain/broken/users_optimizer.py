"""A user's optimizer with a scheduler of torch's, which wraps its step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "graph_break", "line_contains": "optimizer.step()", "op": "optimizer.step()"}


class Signs(torch.optim.Optimizer):
    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign() * group["lr"])


def with_gradients() -> nn.Module:
    model = nn.Linear(4, 2)
    model(torch.randn(3, 4)).sum().backward()
    return model


def broken() -> Example:
    optimizer = Signs(with_gradients(), 0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def update(x: Tensor) -> Tensor:
        y = x * 2
        optimizer.step()
        return y

    return Example(update, (torch.randn(3),))


def repaired() -> Example:
    optimizer = Signs(with_gradients(), 0.1)

    def update(x: Tensor) -> Tensor:
        y = x * 2
        optimizer.step()
        return y

    return Example(update, (torch.randn(3),))
