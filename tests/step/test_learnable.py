"""Learnable tensors outside of the model: refused by name, unless somebody trains them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step.learnable import leaves_of, note_trained, refuse_learnable
from tests.small_models import PROGRAMS, assert_same_weights, batches, compiled, mlp, torch_loop


@pytest.mark.parametrize("way", PROGRAMS)
def test_a_criterion_with_weights_is_refused_in_every_mode(way: str) -> None:
    head = nn.Linear(2, 2)
    step = compiled(mlp(), lambda model, x, y: F.mse_loss(head(model(x)), y), **PROGRAMS[way])
    with pytest.raises(ValueError, match=r"the loss depends on loss_fn<head>.weight \[2, 2\], which requires a grad"):
        step(*batches(1)[0])
    head.requires_grad_(False)
    step(*batches(1)[0])


def test_it_is_refused_without_a_rehearsal_too() -> None:
    head = nn.Linear(2, 2)
    step = compiled(mlp(), lambda model, x, y: F.mse_loss(head(model(x)), y), mode="eager", rehearse=False)
    with pytest.raises(ValueError, match=r"the loss depends on loss_fn<head>.weight \[2, 2\]"):
        step(*batches(1)[0])


class ArcFace(nn.Module):
    """A head that belongs to the loss in published code."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.eye(2) + 0.1)

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(4 * F.linear(F.normalize(features), F.normalize(self.centers)), y)


@pytest.mark.parametrize("way", PROGRAMS)
def test_the_remedy_trains_both_as_the_ordinary_loop_does(way: str) -> None:
    """A head, and a log-variance (Kendall's) beside it: one module holds them, and the loss may call them as before."""

    def together() -> tuple[nn.Module, nn.Module, nn.Parameter, nn.ModuleDict]:
        model, head, log_variance = mlp(), ArcFace(), nn.Parameter(torch.zeros(1))
        return model, head, log_variance, nn.ModuleDict({"m": model, "h": head, "v": nn.ParameterList([log_variance])})

    def weighed(head_loss: Tensor, log_variance: Tensor) -> Tensor:
        return (head_loss * torch.exp(-log_variance) + log_variance).sum()

    model, head, log_variance, everything = together()
    step = compiled(everything, lambda _, x, y: weighed(head(model(x), y), log_variance), lr=1e-2, **PROGRAMS[way])
    said = pytest.warns(UserWarning, match="is kept outside of the model") if way == "captured" else nullcontext()
    with said:  # read, the closure's log-variance is not the model's; so the step is captured by running
        for batch in batches(3):
            step(*batch)
    model, head, log_variance, reference = together()
    torch_loop(reference, batches(3), lambda _, x, y: weighed(head(model(x), y), log_variance), lr=1e-2)
    assert_same_weights(everything, reference)


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
