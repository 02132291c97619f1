"""Taken run by run, a step is the step of the bank, bit by bit, and one program serves all runs and groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile._torch_optim import runs
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile.optim import Transform
from fusion_compile.torch_optimizer import TorchOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.* has a gradient, and had none")

SHAPES = [(16, 24), (24,), (5, 7), (40, 16), (3,), (9, 9)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny parameters are large ones, and the small ones are several runs."""
    monkeypatch.setattr(runs, "LARGE", 4 * 384)
    monkeypatch.setattr(runs, "_TOGETHER", 4 * 112)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    image = torch.randn(4, 8, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    return [*made, nn.Parameter(image)]


def gradients(step: int, like: list[nn.Parameter]) -> Iterator[Tensor | None]:
    """The second step misses some, the third has some that lie in another order."""
    source = torch.Generator().manual_seed(step)
    for i, p in enumerate(like):
        given = torch.randn(p.shape, generator=source, dtype=torch.float32).to(p.dtype)
        if step == 2 and p.ndim == 2:
            given = given.t().contiguous().t()
        yield None if step == 1 and i in (1, 3, 4) else given


def trained(chosen: Transform, steps: int = 4, dtype: torch.dtype = torch.float32, **how: Any) -> TorchOptimizer:
    given = parameters(dtype)
    second = {"params": given[4:], **({"lr": 0.02} if "lr" in chosen.hyperparameters else {})}
    optimizer = optim.as_torch_optimizer([{"params": given[:4]}, second], chosen, **how)
    for step in range(steps):
        for p, gradient in zip(given, gradients(step, given), strict=True):
            p.grad = gradient
        optimizer.step()
    return optimizer


def as_banks(monkeypatch: pytest.MonkeyPatch, *args: Any, **how: Any) -> TorchOptimizer:
    """The same with gradients in banks."""
    with monkeypatch.context() as patch:
        patch.setattr(ParameterGroup, "takes_runs", lambda self, missing: False)
        return trained(*args, **how)


def assert_equal(one: TorchOptimizer, other: TorchOptimizer) -> None:
    """Weights and all that is kept, bit by bit."""
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p, q)
            mine, theirs = one.state[p], other.state[q]
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("name", ["adamw", "lion", "adopt", "sf_adamw"])
def test_bit_by_bit_it_is_the_step_of_the_bank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = getattr(optim, name)(lr=0.01)
    mine = trained(chosen, mode="eager")
    assert len(mine._inside.runs) == 1
    assert_equal(mine, as_banks(monkeypatch, chosen, mode="eager"))


@pytest.mark.parametrize("form", ["master", "kahan", "exact"])
def test_of_half_precision_too(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"mode": "eager", "half_precision": form, "dtype": torch.bfloat16}
    mine = trained(optim.adamw(lr=0.01), **how)
    assert len(mine._inside.runs) == 1
    assert_equal(mine, as_banks(monkeypatch, optim.adamw(lr=0.01), **how))


def test_uphill(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = trained(optim.adamw(lr=0.01), mode="eager", maximize=True)
    assert_equal(mine, as_banks(monkeypatch, optim.adamw(lr=0.01), mode="eager", maximize=True))
    down = trained(optim.adamw(lr=0.01), mode="eager")
    assert not torch.equal(mine.param_groups[0]["params"][0], down.param_groups[0]["params"][0])


def test_compiled_by_inductor_it_is_the_compiled_step_of_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all runs of two groups, whichever gradients are missing."""
    mine = trained(optim.adamw(lr=0.01))
    assert len(mine._inside.runs) == 1 and len(mine._inside.programs) == 0
    assert all(compiled is not None for compiled in mine._inside.runs._compiled.values())
    assert_equal(mine, as_banks(monkeypatch, optim.adamw(lr=0.01)))


def test_live_numbers_count_from_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> TorchOptimizer:
        optimizer = trained(optim.adamw(lr=0.01), steps=1, backend="aot_eager")
        for step in (1, 2):
            optimizer.param_groups[0].update(lr=0.1 * step, weight_decay=0.5)
            given = [p for group in optimizer.param_groups for p in group["params"]]
            for p, gradient in zip(given, gradients(0, given), strict=True):
                p.grad = gradient
            optimizer.step()
        return optimizer

    mine = run()
    monkeypatch.setattr(ParameterGroup, "takes_runs", lambda self, missing: False)
    assert_equal(mine, run())
    assert len(mine._inside.runs) == 1


def test_what_a_transform_read_outside_and_changed_is_still_noticed() -> None:
    class Outside:
        factor = 1.0

    outside = Outside()
    base = optim.scale_by_momentum(0.9)

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        new, state = base.update(updates, state, params, context)
        return {k: -0.1 * outside.factor * u for k, u in new.items()}, state

    chosen = Transform(base.init, update, base.extras._replace(name="a test's", descends=True))
    optimizer = trained(chosen, steps=1, backend="aot_eager")
    assert len(optimizer._inside.runs) == 1
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    outside.factor = 2.0
    with pytest.raises(RuntimeError, match="no longer fits"):
        optimizer.step()
    now = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(map(torch.equal, before, now))
