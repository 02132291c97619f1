"""What all classes of kaon share: half precision by the source's words, and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim import kaon
from tests.small_models import batches, compiled, mlp, squared_error


@pytest.mark.parametrize(("method", "form"), [("stochastic_rounding", "stochastic"), ("kahan16", "exact")])
def test_bf16_weights_are_those_of_a_training_step(method: str, form: str) -> None:
    torch.manual_seed(0)
    recipe = optim.adakaon(momentum="int8")
    step = compiled(mlp(torch.bfloat16), squared_error, optimizer=recipe, mode="eager", half_precision=form)
    torch.manual_seed(0)
    model = mlp(torch.bfloat16)
    options: dict[str, Any] = {"momentum_dtype": "int8", "bf16_method": method, "mode": "eager"}
    optimizer = kaon.Adakaon(model, **options)
    for x, y in batches(3, dtype=torch.bfloat16):
        step(x, y)
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), model.parameters(), strict=True))


def test_groups_have_numbers_of_their_own() -> None:
    model = mlp()
    given = list(model.parameters())
    groups = [{"params": given[:2]}, {"params": given[2:], "lr": 1e-4, "betas": (0.5, 0.9)}]
    optimizer = kaon.Adakaon(groups, lr=1e-3, mode="eager")
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.9)]


def test_nekaon_trains_bf16_weights_with_a_copy_in_fp32() -> None:
    """Its parameters hold the point ahead, so the weights need a bank of their own; eval() shows them, rounded."""
    model, reference = mlp(torch.bfloat16), mlp(torch.bfloat16)
    optimizer = kaon.Nekaon(model.parameters(), mode="eager")
    step = compiled(reference, squared_error, optimizer=optim.nekaon(), mode="eager")
    for x, y in batches(3, dtype=torch.bfloat16):
        step(x, y)
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
    optimizer.eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
