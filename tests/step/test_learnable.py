"""Learnable tensors outside of the model: refused by name, unless somebody trains them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step.learnable import leaves_of, note_trained, refuse_learnable
from tests.small_models import PROGRAMS, batches, compiled, mlp


@pytest.mark.parametrize("way", PROGRAMS)
def test_a_criterion_with_weights_is_refused_in_every_mode(way: str) -> None:
    head = nn.Linear(2, 2)
    step = compiled(mlp(), lambda model, x, y: F.mse_loss(head(model(x)), y), **PROGRAMS[way])
    with pytest.raises(ValueError, match=r"the loss depends on loss_fn<head>.weight \[2, 2\], which requires a grad"):
        step(*batches(1)[0])
    head.requires_grad_(False)
    step(*batches(1)[0])


def test_what_another_step_trains_may_be_used() -> None:
    generator, critic = nn.Linear(4, 2), nn.Linear(2, 1)
    compiled(critic, lambda model, x: model(x).mean(), mode="eager")
    step = compiled(generator, lambda model, x, y: F.softplus(-critic(model(x))).mean(), mode="eager")
    assert torch.isfinite(step(*batches(1)[0]))


def test_an_input_whose_gradient_the_loss_asks_for_is_no_weight() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, y) + gradient.square().mean()

    assert torch.isfinite(compiled(mlp(), loss, mode="eager")(*batches(1)[0]))


def test_leaves_are_found_through_the_graph_once_each() -> None:
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    assert {id(leaf) for leaf in leaves_of((a * a + b).sum() + (c.detach() * a).sum())} == {id(a), id(b)}
    assert leaves_of(torch.ones(())) == []


def test_what_the_loss_writes_itself_and_what_is_trained_is_left_alone() -> None:
    weight = nn.Parameter(torch.ones(2))
    roots = {"loss_fn": {"weight": weight}}
    with pytest.raises(ValueError, match=r"loss_fn\['weight'\] \[2\]"):
        refuse_learnable([weight], roots, [])
    refuse_learnable([weight], roots, ["loss_fn['weight']"])
    note_trained([weight])
    refuse_learnable([weight], roots, [])
