"""`clip_by_global_norm` is torch's clip_grad_norm_."""

from __future__ import annotations

import math

import pytest
import torch

from fusion_compile import optim
from tests.optim.one_tensor import G1, G2, context, same


@pytest.mark.parametrize("bound", [0.5, 4.7, 100.0, math.inf])
def test_clip_is_torch_clip_grad_norm(bound: float) -> None:
    grads = {"a": G1, "b": G2[0]}
    leaves = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, bound)
    transform = optim.clip_by_global_norm(bound)
    clipped, _ = transform.update(grads, transform.init(grads), grads, context(transform))
    for leaf, found in zip(leaves, clipped.values(), strict=True):
        assert leaf.grad is not None
        same(found, leaf.grad)
    assert torch.equal(clipped["a"], G1) == (bound >= 100)
