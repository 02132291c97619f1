"""The loss is returned with the graph that its gradient was taken from."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "autograd_escape", "line_contains": "torch.autograd.grad("}
SETTINGS = {"trace_autograd_ops": True}  # the whole step is one graph


def broken() -> Example:
    def step(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = weight.detach().requires_grad_()
        loss = (x @ leaf).square().mean()
        (grad,) = torch.autograd.grad(loss, [leaf])
        return loss, grad

    return Example(step, (torch.randn(8, 4), torch.randn(2, 8)))


def repaired() -> Example:
    def step(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = weight.detach().requires_grad_()
        loss = (x @ leaf).square().mean()
        (grad,) = torch.autograd.grad(loss, [leaf])
        return loss.detach(), grad

    return Example(step, (torch.randn(8, 4), torch.randn(2, 8)))
