"""A timestep that is a Python number is a tensor to the trace if that makes no difference to the model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import Call, take_apart, with_tensors_for
from fusion_compile._sampler.graph.number_clock import refuse_other_numbers
from fusion_compile._sampler.weights.unservable import Unservable

X = torch.ones(2, 3)


class Takes(nn.Module):
    calls = 0

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, t: Any) -> Tensor:
        self.calls = self.calls + 1
        if self.how == "tells them apart":
            return x * (2 if torch.is_tensor(t) else 3)
        if self.how == "numbers alone":
            return x * t.bit_length()
        if self.how == "tensors alone":
            return x * t[:, None]
        if not torch.is_tensor(t):
            t = torch.tensor([t], device=x.device)
        return x * t.expand(2)[:, None]


def call_of(model: nn.Module, t: object) -> Call:
    return with_tensors_for(take_apart(inspect.signature(model.forward), (X, t), {}), ["t"])


@pytest.mark.parametrize(("t", "dtype"), [(37, torch.int64), (0.25, torch.float64)])
def test_a_model_that_makes_a_tensor_of_a_number(t: float, dtype: torch.dtype) -> None:
    model = Takes("both")
    call = call_of(model, t)
    assert call.numbers == {"t": t} and call.tensors[1].dtype is dtype and call.tensors[1].item() == t
    assert call.key != call_of(model, torch.tensor(t, dtype=dtype)).key
    refuse_other_numbers(model, call)
    assert model.calls == 0  # nothing stays behind


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("tells them apart", "t=3 is a number, and Takes computes something else for a tensor"),
        ("numbers alone", r"Takes fails for a tensor in its place \(AttributeError: .*bit_length.*Pass t as a tensor"),
    ],
)
def test_a_model_to_which_it_matters(how: str, sentence: str) -> None:
    model = Takes(how)
    with pytest.raises(Unservable, match=sentence):
        refuse_other_numbers(model, call_of(model, 3))


def test_the_models_own_error_is_its_own() -> None:
    model = Takes("tensors alone")
    with pytest.raises(TypeError, match="not subscriptable"):
        refuse_other_numbers(model, call_of(model, 3))


def test_what_is_no_number_stays() -> None:
    model = Takes("both")
    for t in (True, None, "3"):
        assert call_of(model, t).numbers == {}
