"""Real runs of forward and backward before anything is captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from fusion_compile._capture.rehearsal.left_behind import Kind
from fusion_compile._step.rehearsed import RehearsedStep, rehearse_step
from tests.small_models import batches, bits, compiled, mlp, squared_error, torch_loop


def rehearsed(model: nn.Module, loss: Any = squared_error, **options: Any) -> RehearsedStep:
    """Of a step that was not called; its state does not change."""
    step = compiled(model, loss, mode="eager", **options)
    before, random = bits(step), torch.get_rng_state()
    try:
        return rehearse_step(model, loss, step._plan, step._state, batches(1)[0])
    finally:
        assert bits(step) == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_outcome_is_the_ordinary_loops(accumulate: int) -> None:
    """float32 rounding of another order of sums is allowed for."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    wanted = rehearsed(model, accumulate=accumulate).wanted
    x, y = batches(1)[0]
    total = torch.zeros(())
    for i in range(accumulate):
        loss = squared_error(model, x.chunk(accumulate)[i], y.chunk(accumulate)[i]) / accumulate
        loss.backward()
        total += loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert_close(wanted.loss, total)
    assert_close(wanted.grad_norm, torch.cat([g.flatten() for g in gradients]).norm())
    assert_close(wanted.buffers, dict(model.named_buffers()))


def test_what_is_left_behind_and_read_from_outside_is_reported() -> None:
    kept: dict[str, Tensor] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(3)
        value = squared_error(model, x, y)
        kept["last"] = value.detach()
        return value

    seen = rehearsed(mlp(), loss)
    assert [(r.label, r.kind) for r in seen.rehearsal.left] == [("loss_fn<kept>['last']", Kind.STATE)]
    assert "torch.manual_seed()" in seen.sources[0].sentence()
    assert kept == {}


def test_reentrant_checkpointing_runs() -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model[2](checkpoint(model[1], model[0](x), use_reentrant=True)), y)

    assert_close(rehearsed(mlp(), loss).wanted.loss, squared_error(mlp(), *batches(1)[0]).detach())


def test_a_loss_that_runs_once_alone_is_named() -> None:
    kept: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept.append(model(x).square().mean())
        return squared_error(model, x, y) + sum(kept)

    seen = rehearsed(mlp(), loss)
    assert "RuntimeError" in seen.rehearsal.once and "loss_fn<kept>" in seen.rehearsal.once
    assert_close(seen.wanted.loss, loss(mlp(), *batches(1)[0]).detach())


def test_an_error_of_the_loss_passes_through() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        rehearsed(mlp(), loss)


def test_a_loss_that_puts_something_into_its_batch_is_told_once() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        target = batch.pop("y")
        out = model(batch["x"])
        batch["out"] = out.detach()
        return (out - target).square().mean()

    data = [{"x": x, "y": y} for x, y in batches(4)]
    step = compiled(mlp(), loss, capture="run")
    with pytest.warns(UserWarning, match=r"the loss puts another value into batch\[0\]\['out'\].*own copy"):
        step(data[0])
    step(data[1])  # and not again
    assert [sorted(batch) for batch in data[:2]] == [["x", "y"]] * 2
    for options, batch in zip(({"mode": "eager"}, {"capture": "read"}), data[2:], strict=True):
        compiled(mlp(), loss, **options)(batch)
        assert sorted(batch) == ["out", "x"]


class Growing(nn.Module):
    """Notes the longest batch, and makes a buffer anew when a longer one comes, as dynamic RoPE does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.longest = nn.Linear(4, 2), torch.tensor(2)
        self.register_buffer("rate", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.max(torch.arange(len(x))) + 1
        if length > self.longest:
            self.register_buffer("rate", torch.ones(2) / length)
            self.longest = length
        out: Tensor = self.inner(x) * self.rate
        return out


def test_what_a_buffer_follows_is_not_kept_without_it() -> None:
    data = [batches(1, size)[0] for size in (2, 4, 2, 8)]
    torch.manual_seed(0)
    model, reference = Growing(), Growing()
    reference.load_state_dict(model.state_dict())
    step = compiled(model, mode="eager")
    found, wanted = [step(*batch) for batch in data], torch_loop(reference, data)
    assert_close(found, wanted)
    assert_close(model.rate, reference.rate)
