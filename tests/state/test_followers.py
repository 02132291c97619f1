"""What lies in a parameter's memory moves with it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._shared_memory import left_behind
from fusion_compile._state import followers
from fusion_compile._state.followers import Move, move, refuse_two_in_one_place, stay

KEPT: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "data": lambda p: p.data,
    "detached row": lambda p: p.detach()[1],
    "view": lambda p: p.view(-1),
    "transposed": lambda p: p.t(),
    "another parameter": lambda p: nn.Parameter(p.data, requires_grad=False),
}


def moved(parameter: nn.Parameter) -> list[Tensor]:
    return move([Move("weight", parameter, parameter.detach().clone())])


@pytest.mark.parametrize("kind", KEPT)
def test_whoever_keeps_a_part_sees_the_new_place(kind: str) -> None:
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    kept = {"anywhere": [KEPT[kind](parameter)]}
    old = parameter.data_ptr()
    assert moved(parameter) == [] and parameter.data_ptr() != old
    with torch.no_grad():
        parameter.add_(10)
    assert torch.equal(kept["anywhere"][0], KEPT[kind](parameter))


def test_a_view_passes_gradients_on_after_the_move() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    row = parameter[1]
    moved(parameter)
    (row * 2).sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.tensor([[0.0] * 3, [2.0] * 3]))


def test_what_reaches_beyond_one_parameter_stays_and_is_noted() -> None:
    flat = torch.zeros(4)
    parameters = [nn.Parameter(flat[:2]), nn.Parameter(flat[2:])]
    move([Move(str(i), p, p.detach().clone()) for i, p in enumerate(parameters)])
    assert left_behind[id(flat)] is flat
    with torch.no_grad():
        parameters[0].fill_(5)
    assert not flat.any()


def test_memory_that_numpy_reads_is_kept_alive() -> None:
    parameter = nn.Parameter(torch.ones(3))
    array = parameter.detach().numpy()
    kept = moved(parameter)
    assert kept and kept[0].data_ptr() == array.ctypes.data


def test_a_place_stays_where_it_is() -> None:
    parameter = nn.Parameter(torch.ones(3))
    place, other = stay(parameter.detach()), parameter.detach()
    old = place.data_ptr()
    moved(parameter)
    assert place.data_ptr() == old and other.data_ptr() == parameter.data_ptr()


def test_nobody_is_looked_for_where_nobody_holds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> list[Any]:
        raise AssertionError("all objects are walked")

    monkeypatch.setattr(followers, "tracked", never)
    parameter = nn.Parameter(torch.ones(3))
    assert moved(parameter) == []


def test_two_parameters_in_one_memory_are_refused() -> None:
    data = torch.zeros(2, 3)
    pair = {"a.weight": nn.Parameter(data), "b.weight": nn.Parameter(data)}
    with pytest.raises(ValueError, match=r"a.weight \[2, 3\] and b.weight \[2, 3\] are two parameters in one memory"):
        refuse_two_in_one_place(pair)
    refuse_two_in_one_place({"a": nn.Parameter(data[:1]), "b": nn.Parameter(data[1:])})
    del pair
    gc.collect()
