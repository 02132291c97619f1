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
    assert written == [("n", 2.0, 2), *[(f"vector/{at}", 0.0, 2) for at in range(3)]]
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


def by_bucket(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    each = model(x).square().mean(1)
    sums = torch.zeros(4).index_add(0, t, each)
    return each.mean(), {"by_t": sums / torch.bincount(t, minlength=4).clamp(min=1), "of_two_axes": torch.ones(2, 2)}


def test_a_loss_by_timestep_bucket_is_a_curve_for_each_entry_or_a_list() -> None:
    torch.manual_seed(0)
    step = fc.compile_training_step(torch.nn.Linear(3, 2), by_bucket, optimizer="adamw", mode="eager")
    curves: dict[str, float] = {}
    lists: list[tuple[str, list[float], int]] = []
    logs = [
        fc.ScalarLogger(step, lambda name, value, at: curves.update({name: value}), every=1),
        fc.ScalarLogger(step, lambda *row: None, vectors=lambda *row: lists.append(row), every=1, prefix="train/"),
    ]
    step(torch.randn(8, 3), torch.arange(8) % 4)
    for log in logs:
        log()
        log.close()
    wanted = step.metrics["by_t"].tolist()
    assert [curves[f"by_t/{at}"] for at in range(4)] == wanted and curves["loss"] > 0
    assert lists == [("train/by_t", wanted, 1)] and not any(name.startswith("of_two_axes") for name in curves)
