"""What these tests look at: scenarios on two processes, and the one process beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.ranks import programs, scenarios
from tests.several_processes import on_ranks


@functools.cache  # tests of other folders import the fixture, and a fixture that is imported is another one
def _seen_by_two(name: str) -> list[Any]:
    return on_ranks(2, scenarios.seen, name)


@pytest.fixture(scope="session")
def two_ranks() -> Callable[[str], list[Any]]:
    """What each of two ranks saw in the scenario of that name, which runs when it is first asked for."""
    return _seen_by_two


@pytest.fixture
def third_of_64() -> Iterator[None]:
    """This process is rank 3 of 64, and hears nobody: torch's own stand-in for a process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    yield
    dist.destroy_process_group()


class OneProcess:
    """The same on the whole batches, in this process."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, optimizer: str, count: int = 5, **options: Any) -> Any:
        """Weights, losses and metrics after `count` steps."""
        key = optimizer, count, repr(options)
        if key not in self._known:
            step = programs.step_of(optimizer, **options)
            losses = [float(step(*batch)) for batch in programs.whole_batches(count)]
            numbers = {name: float(t) for name, t in step.metrics.items() if not t.ndim}
            self._known[key] = {"weights": programs.flat(step.model), "losses": losses, "metrics": numbers}
        return self._known[key]


@pytest.fixture(scope="session")
def one_process() -> OneProcess:
    return OneProcess()


def assert_equal_to_one(found: Any, one: Any, room: float = 2e-6) -> None:
    """That ranks computed what one process computes on the whole batches. `room`: of a weight, absolute; after 5 steps
    with fp32 Newton-Schulz it is the order of additions that differs."""
    assert found["same"]  # bit for bit on all ranks
    assert float((found["weights"] - one["weights"]).abs().max()) <= room
    assert found["losses"] == pytest.approx(one["losses"], abs=room)
    names = ("grad_norm", "update_norm", "mae", "loss", "step", "skipped")
    assert [found["metrics"][n] for n in names] == pytest.approx([one["metrics"][n] for n in names], abs=1e-5)
