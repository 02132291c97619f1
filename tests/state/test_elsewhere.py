"""Tests: a parameter whose numbers are elsewhere keeps what it is, and refuses to be read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile._state.elsewhere import hide, nothing_like, show


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [("a.weight", model.get_parameter("weight"))]


@pytest.fixture
def linear() -> Iterator[nn.Linear]:
    model = nn.Linear(4, 3)
    model.weight.data = nothing_like(model.weight.detach())
    hide(named(model))
    yield model
    show(named(model))


def test_it_says_what_it_is(linear: nn.Linear) -> None:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter) and weight is next(linear.parameters())
    assert weight.shape == (3, 4) and weight.numel() == 12 and weight.dtype == torch.float32 and len(weight) == 3
    weight.grad = None
    assert weight.requires_grad_(True).is_leaf
    assert "step.gathered()" in repr(weight) and str(linear) == "Linear(in_features=4, out_features=3, bias=True)"


READS: list[Callable[[Any], Any]] = [
    lambda m: m.weight + 1,
    lambda m: m.weight.data,
    lambda m: setattr(m.weight, "data", torch.ones(3, 4)),
    lambda m: m(torch.ones(2, 4)),
    lambda m: m.state_dict(),
    lambda m: copy.deepcopy(m),
    lambda m: m.weight[0, 0],
    lambda m: m.weight.tolist(),
    lambda m: m.weight.copy_(torch.ones(3, 4)),
    lambda m: m.to(torch.float64),
    lambda m: m.weight.__dlpack__(),
    lambda m: torch.cat([m.weight, m.weight]),
    lambda m: nn.init.zeros_(m.weight),
]


@pytest.mark.parametrize("read", READS)
def test_it_refuses_to_be_read_and_written(linear: nn.Linear, read: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"a\.weight \[3, 4\] was read or written between steps \(by "):
        read(linear)


def test_what_reads_past_python_finds_no_number(linear: nn.Linear) -> None:
    show(named(linear))
    try:
        assert type(linear.weight) is nn.Parameter and linear.weight.isnan().all()
        assert linear.weight.untyped_storage().nbytes() == 4
    finally:
        hide(named(linear))


def test_a_class_of_ones_own_comes_back() -> None:
    class Own(nn.Parameter):
        pass

    parameter = Own(torch.ones(2))
    hide([("w", parameter)])
    show([("w", parameter)])
    assert type(parameter) is Own and vars(parameter) == {}
