"""Tensors that user code keeps, as state of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._capture.python_state.slots import MISSING, Slot
from fusion_compile._capture.rehearsal.left_behind import Kind, Left
from fusion_compile._capture.rehearsal.provenance import Depends
from fusion_compile._step.carried import Carried


class Holder:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def state_of(holder: Holder, name: str, after: Any) -> Left:
    slot = Slot(vars(holder), name, f"model.{name}")
    return Left(slot.label, slot, Kind.STATE, vars(holder)[name], after, after, (1, 2), Depends.INPUTS)


def written(label: str) -> Left:
    return Left(label, None, Kind.WRITTEN, MISSING, MISSING, MISSING, (1, 2), Depends.INPUTS, "model.py:7")


def test_inside_held_user_code_finds_and_leaves_the_steps_tensors() -> None:
    holder = Holder(mean=torch.zeros(2))
    mine = holder.mean  # type: ignore[attr-defined]
    carried = Carried()
    carried.add([state_of(holder, "mean", torch.ones(2))], {"model": holder})
    with carried.held({"model.mean": torch.full((2,), 5.0)}):
        holder.mean = holder.mean + 1  # type: ignore[attr-defined]
        now = carried.now()
    assert now["model.mean"].tolist() == [6.0, 6.0] and holder.mean is mine  # type: ignore[attr-defined]
    carried.put(carried.forms, now)
    assert holder.mean.tolist() == [6.0, 6.0]  # type: ignore[attr-defined]
    assert holder.mean is not now["model.mean"]  # type: ignore[attr-defined]


def test_what_the_user_changed_is_noticed_by_object_and_by_version() -> None:
    holder = Holder(mean=torch.zeros(2))
    carried = Carried()
    carried.add([state_of(holder, "mean", torch.ones(2))], {"model": holder})
    assert carried.changed_by_the_user().keys() == {"model.mean"}
    with carried.held(carried.tensors()):
        now = carried.now()
    carried.put(carried.forms, now)
    assert carried.changed_by_the_user() == {}
    holder.mean.add_(1)  # type: ignore[attr-defined]
    assert carried.changed_by_the_user()["model.mean"].tolist() == [1.0, 1.0]


def test_a_tensor_written_in_place_is_the_state_itself() -> None:
    total = torch.zeros(2)
    holder, carried = Holder(total=total, same=total), Carried()
    carried.add([written("model.total")], {"model": holder})
    assert carried.tensors() == {"model.total": total} and len(carried.slots()) == 2
    with carried.held({"model.total": torch.ones(2)}):
        assert holder.same.tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
    carried.check()
    holder.total = torch.zeros(2)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"model.total \[2\] was replaced by another tensor after the step"):
        carried.check()


def test_one_slot_is_carried_in_one_way() -> None:
    """A tensor that the first forward makes and later ones write in place stays one that is replaced."""
    holder, carried = Holder(mean=torch.zeros(2)), Carried()
    carried.add([state_of(holder, "mean", torch.ones(2))], {"model": holder})
    carried.add([written("model.mean")], {"model": holder})
    assert carried.labels() == {"model.mean"} and carried.written == {}
    carried = Carried()
    carried.add([written("model.mean")], {"model": holder})
    carried.add([state_of(holder, "mean", torch.ones(2))], {"model": holder})
    assert carried.labels() == {"model.mean"} and carried.written == {}


def test_what_cannot_be_carried_is_named() -> None:
    holder, carried = Holder(box=Holder()), Carried()
    with pytest.raises(ValueError, match=r"model.box changes at every forward and holds a Holder"):
        carried.add([state_of(holder, "box", torch.ones(1))], {"model": holder})
    with pytest.raises(ValueError, match=r"writes into a tensor in place that nothing reachable .* holds .model.py:7"):
        carried.add([written("nowhere")], {"model": holder})


def test_the_signature_follows_what_the_slots_hold() -> None:
    holder, carried = Holder(last=None), Carried()
    carried.add([state_of(holder, "last", torch.ones(2))], {"model": holder})
    empty = carried.signature()
    last: Tensor = torch.zeros(2)
    holder.last = last  # type: ignore[attr-defined]
    assert carried.signature() != empty
