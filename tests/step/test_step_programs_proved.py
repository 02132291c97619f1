"""The first step against the ordinary loop: half precision in the loss, the compiler's rounding, no rehearsal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._step import proof
from fusion_compile._step.step_programs import StepPrograms
from tests.small_models import batches, mlp, torch_loop


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def in_half(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x.half().float()), y)


def step_of(model: nn.Module, loss: Any = plain, **options: Any) -> fc.TrainingStep:
    return fc.compile_training_step(model, loss, optimizer="adamw", backend="aot_eager", **options)


def test_half_precision_inside_of_the_loss_has_its_rounding() -> None:
    made = proof.Proof
    rooms: list[float] = []

    class Seen(made):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            rooms.append(self._room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusion_compile._step.captures.Proof", Seen)
        step_of(mlp(), in_half)(*batches(1)[0])
        step_of(mlp())(*batches(1)[0])
    assert rooms == [proof.ROOM[True], proof.ROOM[False]]


def test_what_only_the_compiler_rounds_is_said_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler whose programs give another loss than the graph that they were made from."""
    from fusion_compile._step.by_running import CapturedStep

    compile_ = CapturedStep.compile

    def worse(self: CapturedStep, state: dict[str, Tensor], batch: Any, **how: Any) -> None:
        compile_(self, state, batch, **how)
        body = self._body

        def rounded(*given: Tensor) -> Any:
            out = body(*given)
            given[self._keys.index("metrics/loss")].mul_(1.01)
            return out

        self._body = rounded

    monkeypatch.setattr(CapturedStep, "compile", worse)
    step = step_of(mlp(), capture="run")
    with pytest.warns(
        UserWarning, match=r"rounds otherwise than the ordinary loop: its loss is .* compiler's rounding"
    ):
        step(*batches(1)[0])
    assert int(step.metrics["step"]) == 1


def test_without_a_rehearsal_the_step_is_read_and_what_cannot_be_is_refused() -> None:
    step = step_of(mlp(), rehearse=False)
    assert torch.isfinite(step(*batches(1)[0])) and [p.captured_by for p in step.programs] == ["read"]
    lstm = nn.LSTM(4, 2)
    refused = step_of(lstm, lambda model, x, y: F.mse_loss(model(x)[0], y), rehearse=False)
    with pytest.raises(ValueError, match=r"Without rehearse=False the step could be captured by running it"):
        refused(*batches(1)[0])


def dropping(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(F.dropout(model(x), 0.5), y)


def dropping_otherwise_when_read(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    value = dropping(model, x, y)
    return value * 1.1 if torch.compiler.is_dynamo_compiling() else value


def test_a_read_step_that_draws_random_numbers_is_compared_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Inductor, which draws others than the ordinary loop: the captured graph stands in for the step."""
    shown: list[bool] = []
    objection = proof.Proof.objection

    def noted(self: proof.Proof, state: dict[str, Tensor]) -> str:
        shown.append(True)
        return objection(self, state)

    monkeypatch.setattr(StepPrograms, "_draws_apart", lambda self, seen: seen.rehearsal.drew_random)
    monkeypatch.setattr(proof.Proof, "objection", noted)
    model, reference = mlp(), mlp()
    torch.manual_seed(1)
    expected = torch_loop(reference, batches(3), dropping)
    step = step_of(model, dropping)
    torch.manual_seed(1)
    got = [step(*batch) for batch in batches(3)]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected))
    assert len(shown) == 2 and [p.captured_by for p in step.programs] == ["read"]


def test_a_read_step_that_draws_and_is_not_the_loops_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepPrograms, "_draws_apart", lambda self, seen: seen.rehearsal.drew_random)
    torch.manual_seed(1)
    [expected] = torch_loop(mlp(), batches(1), dropping)
    step = step_of(mlp(), dropping_otherwise_when_read)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="because when it is read, its loss is"):
        torch.testing.assert_close(step(*batches(1)[0]), expected)
    assert [p.captured_by for p in step.programs] == ["run"] and step.steps_called == 1
