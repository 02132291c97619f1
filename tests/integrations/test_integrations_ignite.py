"""ignite's learning-rate finder and its checkpoints bring back what was there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small_models import batches, mlp
from tests.torch_loops import equal, loss_of, made, train, weights

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore", "error:.*Schedule-Free.*")]
engine = pytest.importorskip("ignite.engine", exc_type=ImportError)
handlers = pytest.importorskip("ignite.handlers", exc_type=ImportError)


def begun(name: str) -> tuple[Any, Any, Any]:
    model = mlp()
    optimizer = made(model, name, lr=1e-2)

    def update(_: Any, batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return model, optimizer, engine.Engine(update)


@pytest.mark.parametrize("name", ["adamw", "sf_adamw", "sf_normuon"])
def test_a_search_for_a_learning_rate_leaves_the_start_and_the_run_is_as_without_it(name: str) -> None:
    model, optimizer, trainer = begun(name)
    start = weights(model)
    finder = handlers.FastaiLRFinder()
    with finder.attach(trainer, {"model": model, "optimizer": optimizer}, num_iter=6, end_lr=0.1) as searching:
        searching.run(batches(8))
    assert len(finder.get_results()["lr"]) > 3
    assert equal(weights(model), start)
    trainer.run(batches(4))
    reference = mlp()
    other = made(reference, name, lr=1e-2)
    train(reference, other, batches(4))
    optimizer.eval()
    other.eval()
    assert equal(weights(model), weights(reference))


def test_a_scheduler_of_ignite_sets_the_rate_of_a_group() -> None:
    _, optimizer, trainer = begun("adamw")
    schedule = handlers.LinearCyclicalScheduler(optimizer, "lr", 1e-3, 1e-1, 4)
    trainer.add_event_handler(engine.Events.ITERATION_STARTED, schedule)
    trainer.run(batches(4))
    assert optimizer.param_groups[0]["steps"] == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer._inside.records[0].seen["lr"])
