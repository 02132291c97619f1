"""`as_torch_optimizer` in loops that others wrote: schedulers, scalers, accelerate, Lightning, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from fusion_compile import optim
from fusion_compile.optim import as_torch_optimizer
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import batches, mlp
from tests.torch_loops import (
    SCHEDULE_FREE,
    close_to_torch,
    equal,
    loss_of,
    made,
    train,
    weights,
)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=20, cycle_momentum=False)


@pytest.mark.parametrize("schedule", [lambda o: LambdaLR(o, lambda i: 1 / (1 + i)), one_cycle])
def test_torchs_schedulers_and_no_recompile(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(model.named_parameters(), optim.adamw(lr=1e-2), backend="aot_eager")
    scheduler = schedule(optimizer)
    train(model, optimizer, batches(1), scheduler.step)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, batches(12)[1:], scheduler.step)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    train(reference, other, batches(12), schedule(other).step)
    close_to_torch(model, reference)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] != 1e-2


def test_reduce_on_plateau_lowers_the_rate_that_the_program_reads() -> None:
    model = mlp()
    optimizer = made(model.named_parameters(), optim.adamw(lr=1e-2))
    scheduler = ReduceLROnPlateau(optimizer, factor=0.0, patience=0)
    train(model, optimizer, batches(2), lambda: scheduler.step(1.0))
    before = weights(model)
    train(model, optimizer, batches(2))
    assert optimizer.param_groups[0]["lr"] == 0.0 and equal(weights(model), before)


def test_a_schedule_of_ours_runs_until_somebody_writes_the_number() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = made([p], optim.adamw(lr=optim.linear(1e-2, total_steps=10)))
    seen = []
    for i in range(6):
        p.grad = torch.ones_like(p)
        if i == 3:
            optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])
    schedule = optim.linear(1e-2, total_steps=10)
    assert seen == [*map(schedule, range(3)), 0.5, 0.5, 0.5] and len(set(seen)) == 4


def test_a_schedule_of_ours_goes_on_after_a_resume() -> None:
    schedule = optim.linear(1e-2, total_steps=10)
    p = nn.Parameter(torch.zeros(3))
    first, second = (made([p], "adamw", lr=schedule) for _ in range(2))
    p.grad = torch.ones_like(p)
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    for i in range(4, 7):
        second.step()
        assert second.param_groups[0]["lr"] == schedule(i)


@pytest.mark.parametrize("overflow_at", [None, 2])
def test_grad_scaler(overflow_at: int | None) -> None:
    """The scaler unscales, and skips the step whose gradient is infinite."""
    found = []
    for ours in (True, False):
        model = mlp()
        optimizer = made(model, optim.adamw(lr=1e-2)) if ours else torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, batch in enumerate(batches(5)):
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss_of(model, batch)).backward()
            if i == overflow_at:
                first = next(model.parameters()).grad
                assert first is not None
                first.fill_(torch.inf)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        found.append(model)
        if ours:
            assert optimizer.param_groups[0]["steps"] == (5 if overflow_at is None else 4)
    close_to_torch(*found)


class AccelerateLike:
    """What accelerate does to an optimizer: its state makes a trip when it is wrapped, ``train()`` before every step,
    and inside the scaler's step a patched ``step`` that tells whether it was skipped."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.scaler, self.called = optimizer, torch.amp.GradScaler("cpu"), 0
        self.original = optimizer.step
        optimizer.load_state_dict(optimizer.state_dict())

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        self.called += 1
        return self.original(*args, **kwargs)

    def step(self) -> None:
        self.optimizer.train()
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.step = self.original


@pytest.mark.parametrize("name", ["adamw", *SCHEDULE_FREE])
def test_an_accelerate_like_wrapper(name: str) -> None:
    models = [Bowl(), Bowl()]
    plain, wrapped = (made(m, name) for m in models)
    outer = AccelerateLike(wrapped)
    for i in range(5):
        for model, scale in zip(models, (lambda x: x, outer.scaler.scale), strict=True):
            model.zero_grad()
            scale(loss_fn(model, *noise(i))).backward()
        plain.set_loss(1.0)
        wrapped.set_loss(1.0)
        plain.step()
        outer.step()
    assert outer.called == 5
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)  # the scale is a power of two: exact


def test_a_lightning_like_wrapper() -> None:
    """It copies ``__dict__``, so that what changes must not lie there."""
    model = Bowl()
    optimizer = made(model, "sf_adamw")
    wrapper: TorchOptimizer = object.__new__(type("LightningLike", (TorchOptimizer,), {}))
    wrapper.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    for i in range(3):
        loss_fn(model, *noise(i)).backward()
        optimizer.step(closure=None)
        optimizer.zero_grad()
    y = weights(model)
    wrapper.eval()
    assert not equal(weights(model), y)
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step()
    assert wrapper.state_dict()["param_groups"][0]["steps"] == 3
    wrapper.train()
    assert equal(weights(model), y)


def test_averaged_model_and_versions() -> None:
    model = mlp()
    optimizer = made(model)
    average = AveragedModel(model)
    versions = {n: p._version for n, p in model.named_parameters()}
    train(model, optimizer, batches(3), lambda: average.update_parameters(model))
    assert all(p._version > versions[n] for n, p in model.named_parameters())
    assert not equal(weights(average.module), weights(model)) and int(average.n_averaged) == 3


def test_hooks_run_around_each_step() -> None:
    model, said = mlp(), []
    optimizer = made(model)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: said.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: said.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: said.append(saved["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: said.append("loaded"))
    train(model, optimizer, batches(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert said == ["before", "after", "before", "after", 1, "loaded"]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo looks at it
@pytest.mark.parametrize("name", ["adamw", "sf_adamw"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_loop_that_is_compiled_itself(name: str, first: int) -> None:
    """``torch.compile`` around forward, backward and step, from the first step on or later, gives the same weights."""
    found = []
    for compiled in (True, False):
        model = mlp()
        optimizer = made(model, name, lr=1e-2)
        scheduler = LambdaLR(optimizer, lambda i: 1 / (1 + i))

        def step(
            x: torch.Tensor, y: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer
        ) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, (x, y))
            loss.backward()
            optimizer.step()
            return loss

        fast: Any = torch.compile(step, backend="eager") if compiled else step
        for i, batch in enumerate(batches(5)):
            (step if i < first else fast)(*batch)
            scheduler.step()
        optimizer.eval()
        found.append(weights(model))
    assert equal(*found)


def test_a_step_that_is_compiled_by_itself_is_the_step() -> None:
    model, reference = mlp(), mlp()
    optimizer = made(model, optim.adamw(lr=1e-2))
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.step()

    compiled: Any = torch.compile(step, backend="eager")
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        compiled()
    train(reference, other, batches(3))
    close_to_torch(model, reference)
