"""Activation checkpointing in a one-graph step without the tag that torch 2.11 needs to find the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.explain.example import Example

EXPECTED = {"kind": "checkpoint_ignored", "line_contains": "checkpoint("}
SETTINGS = {"trace_autograd_ops": True}  # the whole step is one graph
LIKE_TORCH_211 = True  # later ones find the backward by themselves


def broken() -> Example:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).relu()

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
        hidden = checkpoint(block, x, leaf, use_reentrant=False)
        with torch.fx.traceback.annotate({"remat_pass_tag": "is_backward"}):
            (grad,) = torch.autograd.grad(hidden.square().mean(), [leaf])
        return grad

    return Example(step, (torch.randn(8, 8), torch.randn(2, 8)))
