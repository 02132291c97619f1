"""Hooks on parameters: obeyed as in the ordinary loop, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fusion_compile._step.gradient_hooks import GradientHooks, hooked_leaf
from tests.small_models import PROGRAMS, batches, compiled, mlp, torch_loop

WAYS: dict[str, dict[str, Any]] = {**PROGRAMS, "run": {"backend": "aot_eager", "capture": "run"}}


def masked() -> nn.Sequential:
    model: Any = mlp()
    mask = (torch.arange(8) % 2).float()[:, None]
    model[0].weight.register_hook(lambda gradient: gradient * mask)
    model[2].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    found: nn.Sequential = model
    return found


@pytest.mark.filterwarnings("ignore:the step is captured by running it, because 0.weight has a gradient hook")
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_hook_counts_as_in_the_ordinary_loop(way: str) -> None:
    """float32 rounding of another order of sums is allowed for."""
    expected, model = masked(), masked()
    torch_loop(expected, batches(3))
    step = compiled(model, **WAYS[way])
    for batch in batches(3):
        step(*batch)
    assert_close(dict(model.state_dict()), dict(expected.state_dict()))


def test_a_leaf_has_the_hooks_and_the_tags_of_its_parameter() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.no_decay = True  # type: ignore[attr-defined]
    parameter.register_hook(lambda gradient: 3 * gradient)
    leaf = hooked_leaf(parameter, torch.full((2,), 5.0))
    assert torch.autograd.grad(leaf.sum(), leaf)[0].tolist() == [3.0, 3.0]
    assert leaf.no_decay is True and isinstance(leaf, nn.Parameter)  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_after_accumulation_is_refused_whenever_it_comes(way: str) -> None:
    model: Any = mlp()
    step = compiled(model, **WAYS[way])
    step(*batches(1)[0])
    handle = model[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"2.bias \[2\] has a hook from register_post_accumulate_grad_hook"):
        step(*batches(1)[0])
    handle.remove()
    step(*batches(1)[0])


def test_reading_refuses_hooks_that_it_would_ignore() -> None:
    with pytest.raises(
        ValueError, match=r"0.weight has a gradient hook .*leave out capture='read', or remove the hook"
    ):
        compiled(masked(), capture="read")(*batches(1)[0])


def test_a_hook_that_comes_after_reading_is_refused() -> None:
    model: Any = mlp()
    step = compiled(model)
    step(*batches(1)[0])
    handle = model[0].weight.register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(RuntimeError, match=r"a gradient hook was registered on 0.weight after the step was compiled"):
        step(*batches(1)[0])
    handle.remove()
    step(*batches(1)[0])


def test_hooks_elsewhere_are_nobodys_business() -> None:
    hooks = GradientHooks(dict(mlp().named_parameters()))
    other: Tensor = torch.ones(1, requires_grad=True)
    other.register_hook(lambda gradient: gradient)
    hooks.check(read=True)
    assert hooks.names() == []
