"""Warnings of a compiler, where warnings are errors."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._program.compilers_warnings import are_no_errors
from tests.small_models import batches, compiled, squared_error


def test_errors_are_warnings_inside_and_errors_again_behind() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "of no interest")
        with warnings.catch_warnings(record=True) as said, are_no_errors():
            warnings.warn("of no interest", stacklevel=1)
            warnings.warn("said", stacklevel=1)
        assert [str(one.message) for one in said] == ["said"]
        with pytest.raises(UserWarning, match="again"):
            warnings.warn("again", stacklevel=1)


@functools.lru_cache
def width(columns: int) -> float:
    return 1.0 / columns


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * width(x.shape[1])


@pytest.mark.parametrize("capture", ["read", "run"])
def test_a_loss_that_dynamo_warns_of_is_captured_where_warnings_are_errors(capture: str) -> None:
    torch._dynamo.reset()
    model = Scaled(4, 2)
    x, y = batches(1)[0]
    want = float(squared_error(model, x, y).detach())
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("error")
        step = compiled(model, capture=capture)
        loss = float(step(x, y))
    assert loss == pytest.approx(want, rel=1e-6)  # the same operators, uncompiled
    assert step.programs[0].captured_by == capture
