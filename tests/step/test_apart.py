"""Gradients that stay apart until their norm is known give the same step, and their bank begins behind the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._program.program import region_of
from fusion_compile._state.banks import Layout
from fusion_compile._step import apart, pure_step
from tests.small_models import batches, bits, compiled, differing, mlp


def convolutions() -> nn.Module:
    """A convolution in ``channels_last``, a matrix on the spectral path and small vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128)
        )
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return, unused-ignore]


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def images(count: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(3)
    return [torch.randn(6, 3, 4, 4, generator=source) for _ in range(count)]


def trained(monkeypatch: pytest.MonkeyPatch, held_apart: bool, **options: Any) -> fc.TrainingStep:
    monkeypatch.setattr(pure_step, "stays_apart", lambda *given, **named: held_apart)
    step = compiled(convolutions(), loss_fn, **options)
    for x in images(3):
        step(x)
    return step


@pytest.mark.parametrize("options", [{}, {"keep_gradients": True}, {"accumulate": 3}], ids=["", "kept", "cut"])
@pytest.mark.parametrize("recipe", ["adamw", "sf_normuon"])
def test_without_a_bound_every_bit_is_that_of_banks(
    monkeypatch: pytest.MonkeyPatch, recipe: str, options: dict[str, Any]
) -> None:
    given = {"optimizer": recipe, "mode": "eager", **options}
    ours, banks = (trained(monkeypatch, held, **given) for held in (True, False))
    assert differing(bits(ours), bits(banks)) == []
    gradients = [[p.grad for p in step.model.parameters()] for step in (ours, banks)]
    assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    norm, of_banks = (step.metrics["grad_norm"] for step in (ours, banks))
    # The norm is a sum of 25,000 squares in another order, in fp32: a few roundings of half of the sum.
    torch.testing.assert_close(norm, of_banks, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_with_a_bound_only_the_norms_last_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    products = optim.sf_normuon(matmul_dtype=torch.float32)
    ours, banks = (
        trained(monkeypatch, held, optimizer=products, mode="eager", clip_grad_norm=0.01) for held in (True, False)
    )
    for name, p in ours.model.named_parameters():
        # Three steps of at most lr = 8e-3 an entry, whose factor differs in its last bits, through fp32 products.
        torch.testing.assert_close(p, banks.model.get_parameter(name), rtol=0, atol=1e-6)


def test_the_norm_is_that_of_all_entries() -> None:
    source = torch.Generator().manual_seed(0)
    parts = {str(shape): torch.randn(shape, generator=source) for shape in [(3, 4, 2, 2), (7,), (), (5, 6)]}
    want = torch.cat([t.double().reshape(-1) for t in parts.values()]).norm()
    torch.testing.assert_close(apart.norm_of(parts).double(), want, rtol=1e-6, atol=0)


def test_a_bank_of_gradients_begins_behind_the_backward() -> None:
    step = compiled(mlp(), optimizer="adamw")
    x, y = batches(1, size=64)[0]
    step(x, y)
    graph = step.programs[0].aten.graph
    joins = [n for n in graph.nodes if "cat" in str(n.target) and n.meta["val"].shape == step.layout.banks[0].shape]
    assert len(joins) == 1
    assert all(region_of(part) == "optimizer" for part in joins[0].all_input_nodes)


def test_banks_come_first_where_activations_are_few() -> None:
    layout = compiled(mlp())._plan.update.layout
    entries = sum(bank.length for bank in layout.banks)
    assert not apart.stays_apart(layout, saved=4 * entries)
    assert apart.stays_apart(layout, saved=4 * entries + 1)
    assert apart.stays_apart(layout, saved=0, accumulate=2)
    assert not apart.stays_apart(Layout(layout.banks, torch.device("cuda")), saved=1 << 40)
