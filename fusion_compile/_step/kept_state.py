"""State that user code keeps in Python, from a checkpoint: found by its label, and put back where it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusion_compile._capture.python_state.slots import MISSING, Slot, read, write
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._types import Tensors

_ITEM = re.compile(r"^(?P<label>.*)\[(?P<index>\d+)\]$")


class KeptState:
    """What a checkpoint has of it, resolved to slots before anything is written.

    Args:
        roots: What user code is reached from.
        tensors: By path, as `Carried.tensors` names them: a slot's label, with indices of lists behind it.
        numbers: Plain values by label.

    Raises ValueError for a name that leads nowhere; nothing is written then.
    """

    def __init__(self, roots: Mapping[str, Any], tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        self._writes: list[tuple[Slot, Any]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        if not tensors and not numbers:
            return
        reach = Reach(roots)
        slots = {slot.label: slot for slot, _ in reach.slots()}
        by_label = {found.label: found.value for found in reach.tensors.values()}
        for label, value in {**_values(tensors), **numbers}.items():
            here = by_label.get(label)
            slot = slots.get(label) or _absent(reach, label)
            if isinstance(here, Tensor) and isinstance(value, Tensor) and _is_alike(here, value):
                self._copies.append((here, value))
            elif slot is not None:
                _refuse_other_kind(label, read(slot), value)
                self._writes.append((slot, value))
            else:
                raise ValueError(
                    f"the checkpoint has {label}, which is not found in the model or the loss; nothing was loaded. "
                    f"Build the step with the model and the loss that saved it."
                )

    def put(self) -> None:
        """Write everything. Call it without gradients."""
        for target, value in self._copies:
            target.copy_(value)
        for slot, value in self._writes:
            if read(slot) is not value:
                write(slot, value)


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _refuse_other_kind(label: str, now: Any, value: Any) -> None:
    """Raise ValueError for a value that a checkpoint cannot have, or that is no number where user code counts."""
    if isinstance(value, Tensor) or (isinstance(value, list) and all(isinstance(v, Tensor) for v in value)):
        return
    counts = isinstance(now, int | float) and not isinstance(now, bool)
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not (fits if counts else value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(
            f"the checkpoint has {value!r} for {label}, which is {now!r} here; nothing was loaded. Give what "
            f"state_dict() gave."
        )


def _values(tensors: Tensors) -> dict[str, Any]:
    """``{"m.mem[0]": a, "m.mem[1]": b, "m.mean": c}`` -> ``{"m.mem": [a, b], "m.mean": c}``."""
    whole: dict[str, Any] = {}
    lists: dict[str, dict[int, Tensor]] = {}
    for path, tensor in tensors.items():
        if (item := _ITEM.match(path)) is not None:
            lists.setdefault(item["label"], {})[int(item["index"])] = tensor
        else:
            whole[path] = tensor
    for label, items in lists.items():
        if sorted(items) == list(range(len(items))) and len(items) > 1:
            whole[label] = [items[i] for i in range(len(items))]
        else:
            whole |= {f"{label}[{i}]": tensor for i, tensor in items.items()}
    return whole


def _absent(reach: Reach, label: str) -> Slot | None:
    """The slot of an attribute that does not exist yet, of an object that does."""
    owner, _, name = label.rpartition(".")
    for holder in reach.holders:
        if holder.style == ".k" and holder.label == owner and read(Slot(holder.value, name, label)) is MISSING:
            return Slot(holder.value, name, label)
    return None
