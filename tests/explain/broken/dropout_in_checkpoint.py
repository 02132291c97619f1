"""Dropout in a checkpointed block whose backward is in the same graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.explain.example import Example

EXPECTED = {"kind": "rng_in_checkpoint", "line_contains": "F.dropout("}
SETTINGS = {"trace_autograd_ops": True}  # the whole step is one graph


def broken() -> Example:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return F.dropout((x @ weight).relu(), 0.1)

    def step(weight: Tensor, x: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_()
        hidden = checkpoint(block, x, leaf, use_reentrant=False)
        (grad,) = torch.autograd.grad(hidden.square().mean(), [leaf])
        return grad

    return Example(step, (torch.randn(8, 8), torch.randn(2, 8)))


def repaired() -> Example:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).relu()

    def step(weight: Tensor, x: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_()
        hidden = F.dropout(checkpoint(block, x, leaf, use_reentrant=False), 0.1)
        (grad,) = torch.autograd.grad(hidden.square().mean(), [leaf])
        return grad

    return Example(step, (torch.randn(8, 8), torch.randn(2, 8)))
