"""What a step says once, as a warning and in `explain`."""

from __future__ import annotations

import warnings

import pytest
from torch import Tensor, nn

from fusion_compile._step.notices import Notices
from tests.small_models import batches, compiled, mlp, squared_error


def test_each_is_said_once_and_noted() -> None:
    notices = Notices()
    with pytest.warns(UserWarning, match=r"this step ran uncaptured, because it must; the next one does not\.") as said:
        for _ in range(2):
            notices.ran_uncaptured("it must", "the next one does not")
    assert len(said) == 1 and notices.lines == ["a step ran uncaptured, because it must; the next one does not."]


def test_a_step_that_is_captured_by_running_says_why() -> None:
    notices = Notices()
    with pytest.warns(UserWarning, match=r"captured by running it, because of a list\."):
        notices.runs("of a list.")
    assert notices.because == "of a list." and notices.lines == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notices.runs("")
    assert notices.because == "of a list."


def test_explain_says_that_the_first_step_ran_uncaptured() -> None:
    kept: dict[str, Tensor] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if "mean" not in kept:
            kept["mean"] = x.mean(0)
        return squared_error(model, x - kept["mean"], y)

    step = compiled(mlp(), loss)
    with pytest.warns(UserWarning, match="this step ran uncaptured"):
        step(*batches(1)[0])
    assert any("loss_fn<kept>['mean'] is set by the first forward from its inputs" in n for n in step.explain().notes)
