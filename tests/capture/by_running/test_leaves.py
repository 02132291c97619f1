"""Leaves stand for parameters: wherever user code finds the parameter, the gradient reaches the leaf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._capture.by_running.leaves import (
    StandingIn,
    leaf_like,
    parameters_are_leaves,
    standing_for,
    standing_in,
)
from fusion_compile._capture.by_running.trace import run_on_fakes


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


def test_a_leaf_is_a_parameter_with_the_parameters_tags() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.no_decay = True  # type: ignore[attr-defined]
    leaf = leaf_like(parameter, parameter)
    assert isinstance(leaf, nn.Parameter) and leaf.is_leaf and leaf.requires_grad and leaf.no_decay  # type: ignore[attr-defined]
    seen: list[bool] = []

    def f(w: Tensor) -> Tensor:
        traced = leaf_like(parameter, w)
        seen.append(isinstance(traced, nn.Parameter) and traced.no_decay)  # type: ignore[attr-defined]
        return traced * 2

    run_on_fakes(f, {"w": parameter})
    assert seen == [True]


def test_the_gradient_of_a_weight_kept_outside_reaches_its_leaf() -> None:
    model = nn.Linear(3, 2)
    kept = list(model.parameters())
    named = dict(model.named_parameters())

    def loss(x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in kept) + torch.stack([p.sum() for p in kept]).sum()
        return model(x).square().mean() + penalty + Square.apply(kept[0]).sum() + torch.cat([kept[1], kept[1]]).sum()

    def gradients(x: Tensor, *weights: Tensor) -> list[Tensor]:
        leaves = {n: leaf_like(named[n], w) for n, w in zip(named, weights, strict=True)}
        with parameters_are_leaves(leaves, named):
            return list(torch.autograd.grad(loss(x), list(leaves.values())))

    x = torch.randn(4, 3)
    wanted = torch.autograd.grad(loss(x), kept)
    for got in (gradients(x, *kept), run_on_fakes(gradients, {"x": x, **named})(x, *kept)):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_afterwards_torch_is_as_before() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    with parameters_are_leaves({}, {}):
        assert torch.autograd.Function.__dict__["apply"] is not before
    assert torch.autograd.Function.__dict__["apply"] is before


def test_what_torch_was_handed_is_known() -> None:
    kept, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    leaves = {"kept": leaf_like(kept, kept), "other": leaf_like(other, other)}
    with parameters_are_leaves(leaves, {"kept": kept, "other": other}) as stray:
        assert other.numel() == 2 and other.dtype is torch.float32
        (kept * 2).sum()
    assert stray.handed == {id(kept)}


def test_data_that_is_put_into_a_tensor_stands_for_it_in_a_graph() -> None:
    """The old numbers stay where somebody holds them, as in Python."""
    teacher = nn.Parameter(torch.ones(2), requires_grad=False)

    def step(value: Tensor) -> list[Tensor]:
        given = standing_for(teacher, value.clone())
        stray = StandingIn({"teacher": (teacher, given)})
        with standing_in(stray):
            old = teacher.data
            teacher.data = old * 3
            given.data = given + 1
            teacher.data.mul_(2)
            assert isinstance(stray.now(teacher, ()), nn.Parameter)
        return [stray.now(teacher, ()).detach(), old]

    start = torch.tensor([1.0, 2.0])
    for run in (step, run_on_fakes(step, {"value": start})):
        now, old = run(start)
        assert now.tolist() == [8.0, 14.0] and old.tolist() == [1.0, 2.0]
    assert teacher.tolist() == [1.0, 1.0]
