"""Weights keep the order of their axes in memory (channels_last, a transposed matrix) where that is safe."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._state.banks import build_layout
from fusion_compile._state.routing import route
from tests.small_models import assert_same_weights, compiled

LAST = torch.channels_last
FP32: dict[str, Any] = {"matmul_dtype": torch.float32}


def convolutions(memory_format: torch.memory_format = LAST) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3))
    return layers.to(memory_format=memory_format)  # type: ignore[call-overload]


def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
    return m(x).square().mean()


def is_last(model: nn.Module) -> bool:
    return model.get_parameter("0.weight").is_contiguous(memory_format=LAST)


def images(count: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 6, 6, generator=source).contiguous(memory_format=LAST) for _ in range(count)]


@pytest.mark.parametrize("program", [{"mode": "eager"}, {"backend": "aot_eager"}], ids=["eager", "captured"])
def test_channels_last_weights_stay_so_and_train_as_in_the_ordinary_loop(program: dict[str, Any]) -> None:
    mine, reference = convolutions(), convolutions()
    before = {n: p.stride() for n, p in mine.named_parameters()}
    step = compiled(mine, loss_fn, lr=1e-2, **program)
    assert {n: p.stride() for n, p in mine.named_parameters()} == before
    assert is_last(mine) and not mine.get_parameter("0.weight").is_contiguous()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for x in images(3):
        step(x)
        optimizer.zero_grad()
        loss_fn(reference, x).backward()
        optimizer.step()
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)
    assert {n: p.stride() for n, p in step.release().named_parameters()} == before


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [(optim.muon(**FP32), True), (optim.sf_normuon(**FP32), True), (optim.soap(), False), (optim.lion(), True)],
    ids=["muon", "sf_normuon", "soap", "lion"],
)
def test_matrices_of_convolutions_are_updated_alike_in_both_orders(recipe: optim.Transform, kept: bool) -> None:
    """SOAP keeps a basis of columns, which must not mean other columns in another model: it gives up the order."""
    found = []
    for memory_format in (LAST, torch.contiguous_format):
        model = convolutions(memory_format)
        forced = ["weight$"] if recipe.roles else []
        step = compiled(model, loss_fn, optimizer=recipe, mode="eager", force_spectral=forced)
        for x in images(3):
            step(x)
        found.append(model)
    assert is_last(found[0]) is kept
    # fp32 sums of a product in another order, through five iterations of Newton-Schulz on singular values near 0.
    assert_same_weights(found[0], found[1], rtol=1e-2, atol=2e-4)


def test_state_is_saved_by_name_whatever_the_order(tmp_path: Path) -> None:
    last, plain = convolutions(), convolutions(torch.contiguous_format)
    steps = [compiled(m, loss_fn, optimizer="muon", mode="eager", force_spectral=["3.weight"]) for m in (last, plain)]
    for x in images(2):
        steps[0](x)
    steps[0].save(tmp_path / "ck")
    steps[1].load(tmp_path / "ck")
    a, b = (step.state_dict() for step in steps)
    for section in ("model", "optimizer"):
        assert all(torch.equal(t, b[section][n]) for n, t in a[section].items())
    (x,) = images(1)
    torch.testing.assert_close(steps[0](x), steps[1](x), rtol=1e-5, atol=0)  # another order of a convolution's sums


def test_a_transposed_matrix_keeps_its_memory_where_it_is_updated_entry_by_entry() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4).t())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    model = Transposed()
    reference = deepcopy(model)
    step = compiled(model, loss_fn, mode="eager")
    assert model.weight.stride() == (1, 4)
    x = torch.randn(3, 6)
    step(x)
    optimizer = torch.optim.AdamW(reference.parameters())
    loss_fn(reference, x).backward()
    optimizer.step()
    assert_same_weights(model, reference)
    forced = build_layout(model, route(model, ("spectral", "scalar"), (), ["weight"]), columns_in_memory_order=True)
    assert forced.banks[0].places[0].order == ()  # its rows would be permuted


def test_half_precision_and_copies_keep_the_order() -> None:
    model = convolutions().bfloat16()
    step = fc.compile_training_step(model, loss_fn, optimizer="adamw", mode="eager")
    step(images(1)[0].bfloat16())
    assert is_last(model)
    assert is_last(deepcopy(step.model))
    point = step.gradient_point()
    torch.testing.assert_close(point["0.weight"].bfloat16(), model.get_parameter("0.weight").detach(), rtol=0, atol=0)
