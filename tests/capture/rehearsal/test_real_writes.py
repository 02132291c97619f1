"""Real tensors that a run on tensors without data writes, and what a training step makes of them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._capture.rehearsal.real_writes import RealWritesPutBack
from tests.small_models import batches, compiled, squared_error, torch_loop


def test_what_fake_mode_writes_for_real_is_put_back() -> None:
    whole, other = torch.arange(6.0), [torch.ones(2), torch.ones(2)]
    row, writes = whole[:2], RealWritesPutBack()
    with _compat.fake_mode() as mode:
        fake = mode.from_tensor(torch.ones(2))
        with writes:
            row.mul_(0.5)
            row.add_(1.0)
            torch._foreach_mul_(other, 3.0)
            fake.mul_(2.0)
    assert whole.tolist() == [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]  # it was written indeed
    writes.put_back()
    assert whole.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and all(t.tolist() == [1.0, 1.0] for t in other)


def a_write_at_the_fourth_step(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    kept = types.SimpleNamespace(n=0, average=torch.ones(2))

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept.n += 1
        if kept.n == 4:
            kept.average.mul_(0.5)
        return squared_error(model, x, y + kept.average)

    return loss_fn, lambda: kept.average


def a_teacher_that_warms_up(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    kept, teacher = types.SimpleNamespace(n=0), nn.Linear(4, 2).requires_grad_(False)
    teacher.load_state_dict(model.state_dict())

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept.n += 1
        with torch.no_grad():
            for average, now in zip(teacher.parameters(), model.parameters(), strict=True):
                average.mul_(min(0.9, (1 + kept.n) / (10 + kept.n))).add_(now, alpha=0.1)
        return squared_error(model, x, y) + (model(x) - teacher(x)).square().mean()

    return loss_fn, lambda: torch.cat([p.flatten() for p in teacher.parameters()])


PROGRAMS = {"at the fourth step": a_write_at_the_fourth_step, "a teacher": a_teacher_that_warms_up}
WAYS: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "None": {}, "run": {"capture": "run"}}


@pytest.mark.filterwarnings("ignore:the step is captured by running", "ignore:this step ran uncaptured")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_write_happens_once_a_step(program: str, way: str) -> None:
    def start() -> nn.Linear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Linear(4, 2)

    model = start()
    loss_fn, kept = PROGRAMS[program](model)
    wanted, at_end = torch_loop(model, batches(6), loss_fn, lr=1e-2), kept
    model = start()
    loss_fn, kept = PROGRAMS[program](model)
    step = compiled(model, loss_fn, lr=1e-2, **WAYS[way])
    losses = torch.stack([step(*batch).clone() for batch in batches(6)])
    # fp32 sums of another order, over six steps
    torch.testing.assert_close(losses, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept(), at_end(), rtol=1e-5, atol=1e-6)
