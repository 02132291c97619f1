"""State in odd places: behind imports inside functions, special methods, hooks on all modules, context variables."""

from __future__ import annotations

import contextvars
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_models import batches, compiled, squared_error, torch_loop

WAYS: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "None": {}, "run": {"capture": "run"}}
Program = Callable[[], tuple[Callable[..., Tensor], Callable[[], Any]]]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("a_module_of_statistics")
    made.__file__ = __file__
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def imported_inside() -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    statistics: Any = sys.modules["a_module_of_statistics"]
    statistics.kept = {"average": torch.ones(())}

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from a_module_of_statistics import kept  # type: ignore[import-not-found, unused-ignore]

        loss = squared_error(model, x, y)
        kept["average"] = 0.9 * kept["average"] + 0.1 * loss.detach()
        return loss / kept["average"]

    return loss_fn, lambda: statistics.kept["average"]


def behind_a_with_statement() -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    entered = [0]

    class Counting:
        def __enter__(self) -> None:
            entered[0] += 1

        def __exit__(self, *error: object) -> None:
            pass

    counting = Counting()

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with counting:
            return squared_error(model, x, y)

    return loss_fn, lambda: torch.tensor(entered[0])


PROGRAMS: dict[str, Program] = {"import": imported_inside, "with": behind_a_with_statement}


@pytest.mark.filterwarnings("ignore:the step is captured by running")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_is_the_ordinary_loops(program: str, way: str, module: types.ModuleType) -> None:
    def trained(train: Callable[[nn.Module, Callable[..., Tensor]], list[Tensor]]) -> tuple[Tensor, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = nn.Linear(4, 2)
        loss_fn, kept = PROGRAMS[program]()
        return torch.stack(train(model, loss_fn)), kept()

    def by_the_step(model: nn.Module, loss_fn: Callable[..., Tensor]) -> list[Tensor]:
        step = compiled(model, loss_fn, lr=1e-2, **WAYS[way])
        return [step(*batch).clone() for batch in batches(4)]

    got = trained(by_the_step)
    want = trained(lambda model, loss_fn: torch_loop(model, batches(4), loss_fn, lr=1e-2))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # fp32 sums of another order


@pytest.fixture
def seen() -> Iterator[dict[str, Any]]:
    """What a hook on all modules keeps of linear layers; it expects tensors, as a user's does."""
    kept: dict[str, Any] = {"names": set(), "average": torch.zeros(())}

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept["names"].add(type(module).__name__)
        kept["average"] = 0.9 * kept["average"] + 0.1 * output.detach().mean()

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield kept
    handle.remove()


@pytest.mark.filterwarnings("ignore:the step is captured by running")
@pytest.mark.parametrize("way", WAYS)
def test_a_hook_on_all_modules_sees_the_users_modules_alone(way: str, seen: dict[str, Any]) -> None:
    def model() -> nn.Linear:
        seen["average"] = torch.zeros(())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Linear(4, 2)

    torch_loop(model(), batches(3), lr=1e-2)
    wanted = seen["average"]
    step = compiled(model(), lr=1e-2, **WAYS[way])
    for batch in batches(3):
        step(*batch)
    torch.testing.assert_close(seen["average"], wanted, rtol=1e-5, atol=1e-6)
    assert seen["names"] == {"Linear"}


LAST: contextvars.ContextVar[Tensor] = contextvars.ContextVar("LAST")


@pytest.mark.parametrize("way", WAYS)
def test_a_context_variable_that_the_first_step_sets_is_refused(way: str) -> None:
    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = squared_error(model, x, y)
        LAST.set(loss.detach())
        return loss

    step = compiled(nn.Linear(4, 2), loss_fn, **WAYS[way])
    with pytest.raises(ValueError, match=r"LAST.get\(\) is set by the first forward, and .* set it before"):
        step(*batches(1)[0])
    assert LAST.get(None) is None


@pytest.mark.filterwarnings("ignore:the step is captured by running")
@pytest.mark.parametrize("way", WAYS)
def test_a_tag_on_a_parameter_is_read_by_the_loss(way: str) -> None:
    def model() -> nn.Linear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made: Any = nn.Linear(4, 2)
        made.weight.penalty = 0.5
        return made

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        penalties = [p.penalty * p.square().sum() for p in model.parameters() if hasattr(p, "penalty")]
        return squared_error(model, x, y) + torch.stack(penalties).sum()

    wanted = torch_loop(model(), batches(3), loss_fn, lr=1e-2)
    step = compiled(model(), loss_fn, lr=1e-2, **WAYS[way])
    losses = torch.stack([step(*batch).clone() for batch in batches(3)])
    torch.testing.assert_close(losses, torch.stack(wanted), rtol=1e-5, atol=1e-6)  # fp32 sums of another order
