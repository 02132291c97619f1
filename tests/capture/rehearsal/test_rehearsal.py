"""A rehearsal runs the ordinary loop, and after it everything is as it was."""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._capture.rehearsal.left_behind import Kind
from tests.capture.leaving_programs import (
    Program,
    a_buffer_that_is_registered_late,
    a_list_of_tables,
    a_memory_made_at_first_and_then_written,
    a_running_mean,
    a_table_that_is_none_at_first,
)
from tests.capture.small_programs import Part, around, batch, mse, rehearsed


def test_the_results_are_those_of_the_ordinary_loop() -> None:
    torch.manual_seed(0)
    model, loss = a_running_mean()
    rehearsal = rehearsed(model, loss)
    assert rehearsal.results == (loss(model, *batch()), loss(model, *batch()))
    assert rehearsal.runs == 2 and not rehearsal.drew_random


def test_records_hold_the_values_of_their_time() -> None:
    torch.manual_seed(0)
    model, loss = a_memory_made_at_first_and_then_written()
    (record,) = rehearsed(model, loss).left
    part: Any = model[1]  # type: ignore[index]
    with torch.no_grad():
        for value in (record.after_first, record.after_second):
            loss(model, *batch())
            assert torch.equal(value, part.memory)
    assert record.before is None and record.changed_in == (1, 2)


@pytest.mark.parametrize("make", [a_table_that_is_none_at_first, a_list_of_tables, a_buffer_that_is_registered_late])
def test_filled_caches_are_those_of_the_ordinary_loop(make: Callable[[], Program]) -> None:
    torch.manual_seed(0)
    model, loss = make()
    rehearsal = rehearsed(model, loss)
    rehearsal.fill()
    filled = Contents({"model": model})
    value = loss(model, *batch())
    assert filled.changes() == [] and torch.equal(value.detach(), rehearsal.results[0])
    assert rehearsed(model, loss).left == ()


def test_a_filled_lru_cache_stays_filled_where_it_depends_on_nothing() -> None:
    calls: list[str] = []

    @functools.lru_cache
    def table(size: int) -> Tensor:
        calls.append("table")
        return torch.arange(float(size))

    @functools.lru_cache
    def noise(size: int) -> Tensor:
        calls.append("noise")
        return torch.randn(size)

    model = around(Part(lambda part, x: x * table(8) + noise(8)))
    rehearsal = rehearsed(model)
    assert rehearsal.lru_caches == 1
    assert calls == []  # what the runs appended was taken away
    mse(model, *batch())
    assert calls == ["noise"]


def test_every_generator_is_put_back_and_named() -> None:
    own: list[Any] = [
        torch.Generator().manual_seed(1),
        random.Random(1),
        np.random.default_rng(1),
        np.random.RandomState(1),
    ]

    def draw() -> list[float]:
        tensor, python, generator, state = own
        return [
            torch.rand((), generator=tensor).item(),
            python.random(),
            float(generator.random()),
            float(state.rand()),
            *(torch.rand(()).item(), random.random(), float(np.random.rand())),
        ]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mse(model, x, y) * sum(draw())

    model = around(nn.Tanh())
    states = Contents({"loss_fn": loss})
    first = draw()
    states.restore()
    rehearsal = rehearsed(model, loss)
    assert draw() == first
    assert rehearsal.drew_random
    assert rehearsal.draws == {"loss_fn<draw><own>[0]": 2, "torch's generator of the CPU": 2}
    assert set(rehearsal.moved_generators) == {
        *("torch's generator of the CPU", "Python's generator (random)", "numpy's generator (numpy.random)"),
        *(f"loss_fn<draw><own>[{i}]" for i in range(4)),
    }


def test_an_exception_passes_on_and_everything_is_put_back() -> None:
    part: Any = Part(lambda part, x: x, table=None, log=[])

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        part.table = torch.randn(8)
        part.log.append(x.mul_(2))
        raise ZeroDivisionError("as planned")

    model, data = around(part), batch()
    before = Contents({"part": part})
    with pytest.raises(ZeroDivisionError, match="as planned"):
        rehearsed(model, loss, data)
    assert before.changes() == [] and before.moved_generators() == []
    assert torch.equal(data[0], batch()[0])


def test_a_second_run_that_fails_is_said_with_what_the_first_left_behind() -> None:
    terms: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        terms.append(mse(model, x, y))
        return torch.stack(terms).sum()

    seen = rehearsed(around(nn.Tanh()), loss)
    assert "a second time" in seen.once and "the first run had changed loss_fn<terms>" in seen.once
    assert seen.results[0] is seen.results[1] and seen.left == () and terms == []


def test_an_iterator_that_cannot_be_set_back_is_named() -> None:
    numbers = (n for n in range(9))
    rehearsal = rehearsed(around(nn.Tanh()), lambda m, x, y: mse(m, x, y) * next(numbers))
    assert rehearsal.not_put_back[0] == "loss_fn<numbers>"
    assert next(numbers) == 2


def test_compiled_submodules_run_eagerly() -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend="aot_eager")
    rehearsal = rehearsed(around(Part(lambda part, x: part.inner(x), inner=compiled)))
    assert rehearsal.left == ()


def test_writes_to_declared_inputs_are_listed_apart() -> None:
    rehearsal = rehearsed(around(nn.BatchNorm1d(8)))
    assert rehearsal.left == () and [write.runs for write in rehearsal.written_inputs] == [(1, 2)] * 3
    assert rehearsal.of(Kind.CACHE) == ()


def test_a_list_that_a_run_fills_and_puts_out_of_reach_is_emptied() -> None:
    def forward(part: Any, x: Tensor) -> Tensor:
        part.log.append(x)
        part.log = []
        return x

    log: list[Tensor] = []
    part: Any = Part(forward, log=log)
    rehearsed(around(part))
    assert part.log is log and log == []


def test_what_happens_while_garbage_is_collected_is_not_the_losss_doing() -> None:
    """Libraries time collections, in a number that the loss can reach."""

    class Trainer:
        collections = 0
        seconds = 0.0

        def collected(self, phase: str, info: Any) -> None:
            self.collections += 1
            self.seconds += time.perf_counter()

        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            gc.collect()
            return mse(model, x, y)

    trainer = Trainer()
    gc.callbacks.append(trainer.collected)
    before = list(gc.callbacks)
    try:
        rehearsal = rehearsed(nn.Linear(4, 2), trainer.loss)
    finally:
        gc.callbacks.remove(trainer.collected)
    assert rehearsal.left == () and before == [*gc.callbacks, trainer.collected]
