"""`clip_by_global_norm` is torch's clip_grad_norm_."""

from __future__ import annotations

import math

import pytest
import torch

import fusion_compile as fc
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


def test_the_steps_own_bound_leaves_the_optimizers_bound_as_it_is() -> None:
    """Both once had one name, and a step without `clip_grad_norm` set the optimizer's bound to infinity."""
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    sgd = optim.chain(optim.clip_by_global_norm(0.5), optim.scale_by_learning_rate(1.0))
    step = fc.compile_training_step(model, lambda model, x: model(x).sum(), optimizer=sgd, mode="eager")
    step(torch.full((1, 1), 4.0))
    same(model.weight.detach(), before - 0.5 * 4 / (4 + 1e-6))
    assert step.hyperparameters["max_norm"] == 0.5 and step.hyperparameters["clip_grad_norm"] == math.inf
    own = optim.chain(optim.clip_by_global_norm(optim.Named("clip_grad_norm", 1.0)), sgd)
    with pytest.raises(ValueError, match=r"declares the hyperparameter 'clip_grad_norm', .*Named\('max_norm', 1\.0\)"):
        fc.compile_training_step(model, lambda model, x: model(x).sum(), optimizer=own)
