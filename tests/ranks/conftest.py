"""What these tests look at: one run of many scenarios on two processes, and the one process beside them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.ranks import programs, scenarios
from tests.ranks.processes import on_ranks

QUICK = [
    "replicated",
    "divided",
    "optimizer_bytes",
    "uneven",
    "weighed",
    "not_finite",
    "buffers",
    "gradients_and_averages",
    "seeds",
    "saved",
    "other_acts",
    "made_otherwise",
    "refusals",
    "numbers",
    "writes",
    "loss_that_raises",
    "other_programs",
    "proof_fails_on_one",
]
SLOW = [
    "unreadable_on_one",
    "talks",
    "captured",
    "half_precision",
    "accumulated",
    "reduced_in_bf16",
    "compiles_alone",
    "uneven@captured",
    "refusals@captured",
    "other_programs@captured",
    "proof_fails_on_one@captured",
]


class TwoRanks:
    """What each of two ranks saw in each scenario."""

    def __init__(self, names: list[str]) -> None:
        self._found = on_ranks(2, scenarios.run_all, names)

    def __call__(self, name: str) -> list[Any]:
        """What both saw in scenario `name`."""
        seen = [found[name] for found in self._found]
        failed = [
            f"[rank {r}] {what[1]}" for r, what in enumerate(seen) if isinstance(what, tuple) and what[0] == "raised"
        ]
        assert not failed, "\n".join(failed)
        return seen


@functools.cache  # tests of other folders import the fixtures, and a fixture that is imported is another one
def _run_once(names: tuple[str, ...]) -> TwoRanks:
    return TwoRanks([*names])


@pytest.fixture(scope="session")
def two_ranks() -> TwoRanks:
    return _run_once(tuple(QUICK))


@pytest.fixture(scope="session")
def two_ranks_slowly() -> TwoRanks:
    return _run_once(tuple(SLOW))


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
