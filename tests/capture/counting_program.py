"""A small model with plain numbers in its attributes, and its forward and backward on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import Slot

X = torch.ones(2, 3)
Body = Callable[[Any, Tensor], Tensor]


class Counting(nn.Module):
    """`body(model, h)` gets the output of a linear layer; the numbers are the model's attributes."""

    def __init__(self, body: Body, **numbers: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.body = body
        self.__dict__.update(numbers)
        self.names = list(numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.linear(x))

    def slots(self) -> list[Slot]:
        return [Slot(vars(self), name, f"model.{name}") for name in self.names]

    def values(self) -> tuple[Any, ...]:
        return tuple(vars(self)[name] for name in self.names)

    def run_on_fakes(self, mode: Any) -> None:
        with mode:
            leaves = {
                name: mode.from_tensor(p.detach(), static_shapes=True).requires_grad_()
                for name, p in self.named_parameters()
            }
            out = torch.func.functional_call(self, leaves, (mode.from_tensor(X, static_shapes=True),))
            torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)


def counted(body: Body) -> Body:
    """The same body, which counts in `n` first."""

    def count_first(model: Any, h: Tensor) -> Tensor:
        model.n += 1
        return body(model, h)

    return count_first
