"""The scale of an fp16 loss against torch.amp.GradScaler, which it follows decision by decision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._step.loss_scale import moved, start
from tests.small_models import PROGRAMS, batches, bits, compiled, mlp, squared_error

FP16: dict[str, Any] = {"compute_dtype": torch.float16}


def overflowing(step: int) -> float:
    """What the batch of a step is multiplied by: some have infinite gradients at any scale, some at a large one."""
    return torch.inf if step % 97 == 13 else 3e3 if step % 41 == 7 else 1.0


def with_grad_scaler(model: nn.Module, count: int, scaler: torch.amp.GradScaler, interval: int) -> list[float]:
    """The ordinary loop with torch's scaler; the scale after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (x, y), *_ = batches(1)
    scales = []
    for i in range(count):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = squared_error(model, x * overflowing(i), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_the_rule_is_grad_scalers_in_two_thousand_decisions() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=25)
    rule, weight = fc.LossScale(initial=2.0**12, interval=25), nn.Parameter(torch.zeros(1))
    optimizer, state = torch.optim.SGD([weight], lr=0.0), start(rule, torch.device("cpu"))
    found, want = [], []
    for i in range(2000):
        norm = torch.tensor(1.0) if overflowing(i) == 1 and i % 7 != i // 500 else torch.tensor(torch.nan)
        weight.grad = scaler.scale(norm)[None].clone()
        scaler.step(optimizer)
        scaler.update()
        state |= moved(rule, state, norm)
        want.append(scaler.get_scale())
        found.append(float(state["counts/loss_scale"]))
    assert found == [max(scale, rule.floor) for scale in want]
    assert len(set(want)) > 10


@pytest.mark.exhaustive  # 12 s
def test_every_decision_of_two_thousand_steps_is_grad_scalers() -> None:
    count, interval = 2000, 25
    ours, theirs = mlp(), mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=interval)
    want = with_grad_scaler(theirs, count, scaler, interval)
    scale = fc.LossScale(initial=2.0**12, interval=interval)
    step = compiled(ours, mode="eager", lr=1e-3, loss_scale=scale, rehearse=False, **FP16)
    (x, y), *_ = batches(1)
    found = []
    for i in range(count):
        step(x * overflowing(i), y)
        found.append(float(step._state["counts/loss_scale"]))
    assert found == want
    assert max(want) > 2.0**14 and min(want) < 2.0**12  # it grew, and it backed off
    assert int(step.metrics["skipped"]) == sum(b < a for a, b in itertools.pairwise([scale.initial, *want])) > 40
    # AdamW's steps of 1e-3 turn where a gradient of fp16 products is near 0, and one of those is a difference of 2e-3.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


@pytest.mark.parametrize("options", PROGRAMS.values(), ids=PROGRAMS)
def test_small_gradients_survive_and_large_ones_are_skipped(options: dict[str, Any]) -> None:
    def tiny(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return squared_error(model, x, y) * 1e-7  # what goes backward is below fp16's least number, 6e-8

    (x, y), *_ = batches(1)
    norms = {}
    for given in (None, False):
        step = compiled(mlp(), tiny, loss_scale=given, **options, **FP16)
        step(x, y)
        norms[given] = float(step.metrics["grad_norm"])
    plain = compiled(mlp(), tiny, mode="eager")
    plain(x, y)
    want = float(plain.metrics["grad_norm"])
    assert norms[None] == pytest.approx(want, rel=5e-3)  # products of fp16, whose rounding is 5e-4
    assert norms[False] == 0
    step = compiled(mlp(), **options, **FP16)
    before = bits(step)
    step(x, y * 1e3)
    after = bits(step)
    assert float(step.metrics["loss_scale"]) == 2.0**15 and int(step.metrics["skipped"]) == 1
    assert {n for n in before if before[n] != after[n]} <= {
        *(f"counts/{name}" for name in ("step", "skipped", "loss_scale")),
        "steps_called",
    }


def test_fp16_weights_are_scaled_and_micro_batches_too() -> None:
    (x, y), *_ = batches(1, dtype=torch.float16)
    step = compiled(mlp(torch.float16), lambda m, x, y: F.mse_loss(m(x), y) * 1e-3, accumulate=2, mode="eager")
    twin = compiled(mlp(), lambda m, x, y: F.mse_loss(m(x), y) * 1e-3, mode="eager")
    for _ in range(3):  # 2 ** 16 is no fp16 number: the first step backs off, as with GradScaler
        step(x, y)
    assert float(step.metrics["loss_scale"]) == 2.0**15 and int(step.metrics["skipped"]) == 1
    twin(x.float(), y.float())
    step.load_state_dict(step.state_dict())
    first = compiled(
        mlp(torch.float16), lambda m, x, y: F.mse_loss(m(x), y) * 1e-3, loss_scale=fc.LossScale(2.0**10), mode="eager"
    )
    first(x, y)
    # Weights, products and gradients of fp16, of 5e-4 each.
    assert float(first.metrics["grad_norm"]) == pytest.approx(float(twin.metrics["grad_norm"]), rel=1e-2)


def test_it_is_saved_and_resumed_bitwise(tmp_path: Path) -> None:
    def made() -> fc.TrainingStep:
        return compiled(mlp(), mode="eager", loss_scale=fc.LossScale(interval=2), **FP16)

    data = batches(5)
    step = made()
    for x, y in data[:3]:
        step(x, y)
    step.save(tmp_path)
    again = made()
    again.load(tmp_path)
    for x, y in data[3:]:
        step(x, y)
        again(x, y)
    assert bits(again) == bits(step) and float(step.metrics["loss_scale"]) > 2.0**16


def test_bf16_has_none_and_what_does_not_fit_is_refused() -> None:
    (x, y), *_ = batches(1)
    step = compiled(mlp(), mode="eager", compute_dtype=torch.bfloat16)
    step(x, y)
    assert "loss_scale" not in step.metrics
    for given in ({"growth": 1.0}, {"backoff": 1.0}, {"floor": 0.0}, {"initial": 1e-9}, {"interval": 0}):
        with pytest.raises(ValueError, match="LossScale"):
            fc.LossScale(**given)
    with pytest.raises(TypeError, match=r"loss_scale=3\.0 is a float"):
        compiled(mlp(), loss_scale=3.0)

    def inner(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        squared_error(model, x, y).backward()
        return squared_error(model, x, y)

    with pytest.raises(ValueError, match="the scale of an fp16 loss"):
        compiled(mlp(), inner, mode="eager", **FP16)(x, y)


def test_the_floor_holds() -> None:
    step = compiled(mlp(), mode="eager", loss_scale=fc.LossScale(initial=4.0, floor=1.0), rehearse=False, **FP16)
    (x, y), *_ = batches(1)
    for _ in range(4):
        step(x * torch.inf, y)
    assert float(step.metrics["loss_scale"]) == 1.0
