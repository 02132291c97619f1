"""`ScalarLogger` writes what a step's metrics were, every so many steps, in order and without a read on the way."""

from __future__ import annotations

import pytest
import torch

import fusion_compile as fc
from fusion_compile.scalar_logger import _Reading
from tests.data.bowl import Bowl, loss_fn, noise


def test_every_fifth_step_is_written_with_its_own_values() -> None:
    step = fc.compile_training_step(Bowl(), loss_fn, optimizer="adamw", mode="eager")
    written: list[tuple[str, float, int]] = []
    log = fc.ScalarLogger(step, lambda *row: written.append(row), every=5, prefix="train/")
    expected = {}
    for i in range(12):
        step(*noise(i))
        log()
        if step.steps_called % 5 == 0:
            expected[step.steps_called] = {k: float(v) for k, v in step.metrics.items()}
    log.close()
    assert sorted({at for _, _, at in written}) == [5, 10]
    for name, value, at in written:
        assert value == pytest.approx(expected[at][name.removeprefix("train/")], rel=1e-6)  # fp32
    assert {name for name, _, _ in written} == {f"train/{name}" for name in expected[5]}


class Pending:
    """An event that arrives when told to."""

    arrived = False
    waited = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waited = True


def test_a_copy_on_its_way_is_not_waited_for_until_close() -> None:
    """The event of a GPU, played: nothing is written before it says so, and then the value of its own step."""

    class Counter:
        steps_called = 0

        @property
        def metrics(self) -> dict[str, torch.Tensor]:
            return {"n": torch.tensor(self.steps_called), "vector": torch.zeros(3)}

    counter, event = Counter(), Pending()
    written: list[tuple[str, float, int]] = []
    log = fc.ScalarLogger(counter, lambda *row: written.append(row), every=2)
    counter.steps_called = 2
    log()
    assert written == [("n", 2.0, 2)]
    written.clear()
    reading = _Reading(4, {"n": torch.tensor(4.0)})
    reading._arrived = event  # type: ignore[assignment]
    log._on_their_way.append(reading)
    counter.steps_called = 5
    log()
    assert written == [] and not event.waited
    event.arrived = True
    log()
    assert written == [("n", 4.0, 4)] and not event.waited
    event.arrived = False
    log._on_their_way.append(reading)
    log.close()
    assert event.waited and written == [("n", 4.0, 4)] * 2


def test_a_step_count_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="every=0 is not a number of steps"):
        fc.ScalarLogger(None, print, every=0)  # type: ignore[arg-type]
