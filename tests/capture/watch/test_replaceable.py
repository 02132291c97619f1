"""Another tensor of one kind may stand in a slot; one of another kind is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._capture.watch.replaceable import of_one_kind

OTHERS = {
    "another dtype": (torch.zeros(2, dtype=torch.float64), "a tensor (2,) of torch.float64 on cpu"),
    "another shape": (torch.zeros(3), "a tensor (3,) of torch.float32 on cpu"),
    "a gradient": (nn.Parameter(torch.zeros(2)), "a tensor (2,) of torch.float32 on cpu, which requires a gradient"),
    "no tensor": (None, "None"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_tensor_of_another_kind_is_told_with_both_kinds(other: str) -> None:
    value, told = OTHERS[other]
    held: dict[str, Tensor | None] = {f"t{i}": torch.zeros(2) for i in range(5)}
    lots = of_one_kind([Slot(held, key, f"model.{key}") for key in held], 2)
    assert len(lots) == 3 and all(lot.is_as_it_was() for lot in lots)
    held["t3"] = torch.ones(2)
    assert all(lot.is_as_it_was() for lot in lots)
    held["t3"] = value
    assert [lot.is_as_it_was() for lot in lots] == [True, False, True]
    ((label, before, after),) = lots[1].differences()
    assert (label, str(before), str(after)) == ("model.t3", "a tensor (2,) of torch.float32 on cpu", told)


def test_no_slots_are_no_lots() -> None:
    assert of_one_kind([], 0) == []


class Holder:
    """Keeps a tensor in an attribute that is no dictionary's entry."""

    __slots__ = ("t",)
    t: Tensor | None


@pytest.mark.parametrize("other", OTHERS)
def test_a_slot_of_an_object_is_compared_as_well(other: str) -> None:
    value, told = OTHERS[other]
    held = Holder()
    held.t = torch.zeros(2)
    (lot,) = of_one_kind([Slot(held, vars(Holder)["t"], "model.held.t")], 2)
    held.t = torch.ones(2)
    assert lot.is_as_it_was()
    held.t = value
    assert not lot.is_as_it_was()
    assert [str(after) for _, _, after in lot.differences()] == [told]


def test_a_tensor_of_another_class_of_the_same_kind_may_stand_there() -> None:
    held: dict[str, Tensor] = {"t": torch.zeros(2)}
    (lot,) = of_one_kind([Slot(held, "t", "model.t")], 2)
    held["t"] = nn.Parameter(torch.ones(2), requires_grad=False)
    assert lot.is_as_it_was()
