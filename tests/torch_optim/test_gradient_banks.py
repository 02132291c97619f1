"""Gradients are gathered into the same memory at each step, and what somebody holds is not overwritten."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile import optim
from fusion_compile._state.banks import build_layout
from fusion_compile._state.routing import route
from fusion_compile._torch_optim.gradient_banks import GradientBanks
from tests.small_models import mlp


def test_they_hold_what_is_given_zeros_elsewhere_and_stay_where_they_are() -> None:
    model = mlp()
    members = dict(model.named_parameters())
    layout = build_layout(model, route(model, ("scalar",)))
    banks = GradientBanks(layout)
    given = {name: torch.randn_like(p) for name, p in members.items()}
    first = banks.gather(members, given, uphill=False)
    torch.testing.assert_close(layout.views(first), given, rtol=0, atol=0)
    fewer = {name: g for name, g in given.items() if name != "0.weight"}
    second = banks.gather(members, fewer, uphill=True)
    want = {name: -fewer[name] if name in fewer else torch.zeros_like(p) for name, p in members.items()}
    torch.testing.assert_close(layout.views(second), want, rtol=0, atol=0)
    assert all(second[key] is bank for key, bank in first.items())


def test_gradients_that_somebody_holds_stay_what_they_were() -> None:
    """As gradient surgery holds those of several tasks, which a view of the banks would make one."""
    model = nn.Linear(4, 2)
    optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager")
    held, copies = [], []
    for scale in (1.0, 2.0, 3.0):
        optimizer.zero_grad()
        (model(torch.ones(3, 4)).square().mean() * scale).backward()
        assert model.weight.grad is not None
        held.append(model.weight.grad)
        copies.append(model.weight.grad.clone())
        optimizer.step()
    torch.testing.assert_close(held, copies, rtol=0, atol=0)
