"""A parameter that has a gradient after it had none is said once, where steps are counted; torch counts for each."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fusion_compile import optim

SAID = "has a gradient, and had none in an earlier step of its group"


def trained(optimizer: str | optim.Transform, given: list[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights after a step for each letter of `given`, and what was warned of. A letter names the head that is read."""
    torch.manual_seed(0)
    heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    made = optim.as_torch_optimizer(heads, optimizer, mode="eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for head in given:
            heads[head](torch.ones(3, 4)).square().mean().backward()
            made.step()
            made.zero_grad()
    said = [str(one.message) for one in seen if SAID in str(one.message)]
    return {name: p.detach().clone() for name, p in heads.named_parameters()}, said


@pytest.mark.parametrize("given", ["abab", "aabb"])
def test_a_parameter_that_comes_back_or_late_is_said_once(given: str) -> None:
    (said,) = trained("adamw", [*given])[1]
    assert said.startswith("b.") and "optim.leave_unread(recipe)" in said


def test_nothing_is_said_where_no_count_decides() -> None:
    assert trained("adamw", ["a", "a", "a"])[1] == []  # a part that never trains
    assert trained("lion", [*"abab"])[1] == []
    assert trained(optim.leave_unread(optim.adamw(1e-2)), [*"abab"])[1] == []


def test_what_is_recommended_is_torchs() -> None:
    weights, _ = trained(optim.leave_unread(optim.adamw(1e-2, weight_decay=0.0)), [*"aabab"])
    torch.manual_seed(0)
    heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    theirs = torch.optim.AdamW(heads.parameters(), lr=1e-2, weight_decay=0.0)
    for head in "aabab":
        heads[head](torch.ones(3, 4)).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
    for name, p in heads.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-6, atol=1e-7)
