"""A Python pointer into a queue, a ring or a table: one program, and the ordinary loop's numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_models import assert_same_weights, batches, compiled, mlp, torch_loop

pytestmark = pytest.mark.filterwarnings("ignore:the step is captured by running it")

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def slices(kept: SimpleNamespace) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, n = model(x), kept.n
        with torch.no_grad():
            kept.q[n : n + 2] = out[:2]
            kept.q.narrow(0, n, 1).mul_(0.5)
        kept.n = (n + 2) % len(kept.q)
        return F.mse_loss(out, y) + (out @ kept.q.T).square().mean()

    return loss


def rows(kept: SimpleNamespace) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, n = model(x), kept.n
        old = kept.q[n].clone()
        with torch.no_grad():
            kept.q[n].copy_(out.mean(0))
            kept.q[(n + 1) % 24, 1] = 3
        kept.n = (n + 1) % 24
        return F.mse_loss(out, y) + (out - old).square().mean()

    return loss


def columns(kept: SimpleNamespace) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, n = model(x), kept.n
        places = torch.arange(n, n + 2) % 24
        with torch.no_grad():
            kept.q.T[..., n : n + 2] = out[:2].T
        kept.n = (n + 2) % 24
        return F.mse_loss(out, y) + (out.mean(0) - kept.q[places]).square().mean()

    return loss


@pytest.mark.parametrize("made", [slices, rows, columns])
def test_one_program_at_all_positions(made: Callable[[SimpleNamespace], Loss]) -> None:
    data, model, reference = batches(14), mlp(), mlp()
    kept, wanted = (SimpleNamespace(q=torch.ones(24, 2), n=0) for _ in range(2))
    losses = torch_loop(reference, data, made(wanted))
    step = compiled(model, made(kept), capture="run")
    found = [step(*batch) for batch in data]
    # To a few roundings of fp32, as another order of sums makes.
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    assert_same_weights(model, reference)
    torch.testing.assert_close(kept.q, wanted.q, rtol=1e-5, atol=1e-6)
    assert kept.n == wanted.n
    # `rows` has one more where its second position wraps around.
    assert len(step.programs) <= 2


def test_a_part_that_is_read_after_the_whole_was_written_is_refused_by_name() -> None:
    kept = SimpleNamespace(q=torch.ones(24, 2), n=0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, old = model(x), kept.q[kept.n]
        with torch.no_grad():
            kept.q.mul_(0.5)
        kept.n += 1
        return F.mse_loss(out, y) + (out - old).square().mean()

    step = compiled(mlp(), loss)
    with pytest.raises(ValueError, match=r"loss_fn<kept>\.n \(0\).* take a clone\(\) of the part"):
        step(*batches(1)[0])
    assert kept.n == 0


def test_a_phase_that_alternates_has_two_programs() -> None:
    kept = SimpleNamespace(phase="warm")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        warm, kept.phase = kept.phase == "warm", {"warm": "cold", "cold": "warm"}[kept.phase]
        out = model(x)
        return F.mse_loss(out, y) if warm else F.l1_loss(out, y)

    data, model, reference = batches(5), mlp(), mlp()
    step = compiled(model, loss, capture="run")
    for batch in data:
        step(*batch)
    kept.phase = "warm"
    torch_loop(reference, data, loss)
    assert_same_weights(model, reference)
    assert len(step.programs) == 2


def test_a_part_that_grows_for_ever_is_refused_at_once() -> None:
    kept = SimpleNamespace(n=0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept.n += 1
        return F.mse_loss(model(x), y) * torch.ones(64)[: kept.n].mean()

    step = compiled(mlp(), loss)
    with pytest.raises(ValueError, match=r"loss_fn<kept>\.n \(0\) decides a shape.* too many\..* mode='eager'"):
        step(*batches(1)[0])


def test_a_batchs_number_may_be_a_position() -> None:
    table = torch.linspace(0.5, 1.5, 32)

    def loss(model: nn.Module, x: Tensor, y: Tensor, t: int) -> Tensor:
        return F.mse_loss(model(x), y) * table[t]

    data: list[tuple[Any, ...]] = [(x, y, 3 * i) for i, (x, y) in enumerate(batches(10))]
    model, reference = mlp(), mlp()
    step = compiled(model, loss, capture="run")
    for batch in data:
        step(*batch)
    torch_loop(reference, data, loss)
    assert_same_weights(model, reference)
    assert len(step.programs) == 1
