"""The numbers of the last step by name, as copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._state import keys
from fusion_compile._step.metrics import drop_metrics, fit_metrics, keep_metrics, step_metrics
from tests.refusals import refused
from tests.small_models import batches, compiled, mlp, squared_error


def test_numbers_metrics_and_counts_stand_together_and_are_copies() -> None:
    step = compiled(mlp(), mode="eager", lr=0.5)
    step(*batches(1)[0])
    found = step_metrics(step._plan.update, step._state)
    assert set(found) == {
        *step.hyperparameters,
        "loss",
        "grad_norm",
        "update_norm",
        "step",
        "skipped",
    }
    assert (float(found["lr"]), int(found["step"]), int(found["skipped"])) == (0.5, 1, 0)
    step.hyperparameters["lr"] = 0.25
    step(*batches(1)[0])
    assert (float(found["lr"]), int(found["step"])) == (0.5, 1)


def test_a_metric_gets_its_room_and_may_not_have_a_name_of_the_steps_own() -> None:
    step = compiled(mlp(), mode="eager")
    update, state = step._plan.update, dict(step._state)
    keep_metrics(update, state, {"accuracy": ((3,), torch.int64)})
    room = state[keys.metrics("accuracy")]
    assert (room.shape, room.dtype, int(room.sum())) == ((3,), torch.int64, 0)
    before = set(state)
    with pytest.raises(ValueError, match="the metric name 'lr' is taken by the step itself"):
        keep_metrics(update, state, {"fine": ((), torch.float32), "lr": ((), torch.float32)})
    assert set(state) == before


def test_metrics_of_the_loss_come_and_go_and_those_of_the_step_stay() -> None:
    step = compiled(mlp(), mode="eager")
    update, state = step._plan.update, dict(step._state)
    own = set(state)
    fit_metrics(update, state, {keys.metrics("a"): torch.ones(2), keys.metrics("loss"): torch.ones(())})
    assert set(state) == own | {keys.metrics("a")} and state[keys.metrics("a")].shape == (2,)
    room = state[keys.metrics("a")]
    fit_metrics(update, state, {keys.metrics("a"): torch.zeros(2)})
    assert state[keys.metrics("a")] is room
    fit_metrics(update, state, {keys.metrics("a"): torch.zeros(2, dtype=torch.int64)})
    assert state[keys.metrics("a")].dtype == torch.int64
    with pytest.raises(ValueError, match="the metric name 'skipped' is taken by the step itself"):
        fit_metrics(update, state, {keys.metrics("skipped"): torch.zeros(())})
    assert set(state) == own | {keys.metrics("a")}
    drop_metrics(state)
    assert set(state) == own


class Changing:
    """A loss whose metrics at call 3 are `then`."""

    def __init__(self, then: str) -> None:
        self.then = then

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, dict[str, Any]]:
        odd = int(at) == 3
        metrics = {"a": x.sum(0) if odd and self.then == "of another shape" else x.sum()}
        if odd and self.then == "one more":
            metrics["late"] = y.sum()
        if odd and self.then == "called loss":
            metrics["loss"] = y.sum()
        return squared_error(model, x, y), {} if odd and self.then == "gone" else metrics


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("then", ["one more", "gone", "of another shape", "called loss"])
def test_an_uncaptured_step_shows_what_the_loss_returned_as_an_ordinary_loop_does(
    then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is taken by half: where weights moved, counters did."""
    calls = [0]
    loss = Changing(then)

    def counted(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return loss(model, x, y, torch.tensor(calls[0]))

    step, plain = compiled(mlp(), counted, mode="eager"), compiled(mlp(), mode="eager")
    for i, (x, y) in enumerate(batches(5), start=1):
        calls[0] = i
        if i == 3 and then == "called loss":
            with refused(step, ValueError, "the metric name 'loss' is taken by the step itself"):
                step(x, y)
            calls[0] = 0
        assert torch.equal(step(x, y), plain(x, y))
        shown = {n: t for n, t in step.metrics.items() if n in ("a", "late")}
        expected = loss(step.model, x, y, torch.tensor(calls[0]))[1]
        assert shown.keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in shown.items())
        assert (int(step.metrics["step"]), step.steps_called) == (i, i)
    assert torch.equal(step.model.get_parameter("0.weight"), plain.model.get_parameter("0.weight"))


class Tenth:
    """A loss with an accuracy at every third step, as people log it."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps += 1
        more = {"accuracy": y.sum()} if self.steps % 3 == 0 else {}
        return squared_error(model, x, y), {"a": x.sum(), **more}


def by_size(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return squared_error(model, x, y), {"a": x.sum()} if len(x) == 8 else {"b": y.sum()}


def by_flag(model: nn.Module, x: Tensor, y: Tensor, log: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    return squared_error(model, x, y), {"a": x.sum()} if log else {}


@pytest.mark.filterwarnings("ignore:the step is captured by running:UserWarning", "ignore:batch:UserWarning")
@pytest.mark.parametrize("capture", [None, "run"])
@pytest.mark.parametrize("kind", ["counted", "by size", "by flag"])
def test_a_captured_step_shows_the_metrics_of_each_step(kind: str, capture: Any) -> None:
    """Each outcome has a program, and none sees what another one shows."""
    loss: Any = {"counted": Tenth, "by size": lambda: by_size, "by flag": lambda: by_flag}[kind]
    mine, theirs = loss(), loss()
    step, plain = compiled(mlp(), mine, capture=capture), compiled(mlp(), mode="eager")
    data = [batches(1, size=4 if kind == "by size" and i % 2 else 8)[0] for i in range(7)]
    for i, batch in enumerate(data):
        given = (*batch, bool(i % 2)) if kind == "by flag" else batch
        expected = theirs(step.model, *given)[1]
        assert torch.allclose(step(*given), plain(*batch))
        shown = {n: t for n, t in step.metrics.items() if n in ("a", "b", "accuracy")}
        assert shown.keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in shown.items())
    assert len(step.programs) == 2


def test_a_captured_metric_keeps_its_shape_and_nothing_changes_at_a_refusal() -> None:
    step = compiled(mlp(), lambda m, x, y: (squared_error(m, x, y), {"each": x.sum(1)}))
    step(*batches(1)[0])
    with refused(step, ValueError, "returns the metric 'each' as [4] torch.float32, before as [8]", "return a number"):
        step(*batches(1, size=4)[0])
