"""A program says for which values, read from tensors, it was made."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.graph.export import record_reads, trace_denoiser
from fusion_compile._sampler.graph.roles import assign_roles
from fusion_compile._sampler.specialised import MOST_NUMBERS_OF_STEP, MOST_VALUES, Specialised
from fusion_compile._sampler.split import split_denoiser

X, T, Y = torch.ones(2, 3), torch.full((2,), 0.5), torch.zeros(2)


class Branches(nn.Module):
    def __init__(self, decides: str) -> None:
        super().__init__()
        self.decides = decides
        self.gate = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        value = {"request": y, "step": t, "live": x[:, 0], "weight": self.gate}.get(self.decides, y)
        if self.decides == "number of step":
            return x + len({*t.tolist()})
        if self.decides != "nothing" and (value == 0).all():
            return x + t[:, None]
        return x * t[:, None] + y[:, None]


def call_of(model: nn.Module, *args: Any) -> Call:
    return take_apart(inspect.signature(model.forward), args, {})


def specialised(decides: str) -> tuple[Specialised, Branches]:
    model = Branches(decides).eval()
    call = call_of(model, X, T, Y)
    traced = trace_denoiser(model, call, record_reads(model, call))
    split = split_denoiser(traced, call, assign_roles(call.arguments, None), n_steps=4)
    return Specialised(split, "Branches"), model


def test_a_program_without_reads_fits_every_call() -> None:
    free, model = specialised("nothing")
    assert free.fits(call_of(model, X, T, Y + 1)) and free.where == "" and free.weight_names == set()


@pytest.mark.parametrize(
    ("decides", "most"), [("request", MOST_VALUES), ("step", MOST_VALUES), ("number of step", MOST_NUMBERS_OF_STEP)]
)
def test_calls_that_read_the_same_fit(decides: str, most: int) -> None:
    made, model = specialised(decides)
    zero, one = torch.zeros(2), torch.ones(2)
    fits = {
        "request": [made.fits(call_of(model, X, T, y)) for y in (Y, zero, one)],
        "step": [made.fits(call_of(model, X, t, Y)) for t in (T, one, zero)],
        "number of step": [made.fits(call_of(model, X, t, Y)) for t in (T, T.clone(), one)],
    }[decides]
    assert fits == [True, True, False] and made.most == most
    assert made.where.startswith(__file__)


def test_a_request_that_was_written_to_is_read_again() -> None:
    made, model = specialised("request")
    y = torch.zeros(2)
    assert made.fits(call_of(model, X, T, y)) and made.fits(call_of(model, X, T, y))
    y.add_(1)
    assert not made.fits(call_of(model, X, T, y))


def test_weights_that_decide_are_named_and_followed() -> None:
    made, model = specialised("weight")
    assert made.weight_names == {"gate"} and made.fits(call_of(model, X, T, Y))
    with torch.no_grad():
        model.gate.add_(1)
    assert not made.fits(call_of(model, X, T, Y))
    made.replace({"gate": torch.zeros(2)})
    assert made.fits(call_of(model, X, T, Y))


def test_the_latent_must_not_decide() -> None:
    with pytest.raises(ValueError, match=r"Branches reads the contents of a tensor at .*:\d+, and x decides it"):
        specialised("live")
