"""State that user code keeps in Python, from a checkpoint: found by its label, and put back where it was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fusion_compile._capture.python_state.slots import MISSING, Slot, read, write
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._step.carried import Carried
from fusion_compile._step.carried_values import filled, form_of, tensors_in
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
        self._at: dict[str, Tensor] = {}
        if not tensors and not numbers:
            return
        reach = Reach(roots)
        slots = {slot.label: slot for slot, _ in reach.slots()}
        by_label = {found.label: found.value for found in reach.tensors.values()}
        rest = self._into_containers(slots, tensors)
        for label, value in {**_values(rest), **numbers}.items():
            here = by_label.get(label)
            slot = slots.get(label) or _absent(reach, label)
            if isinstance(here, Tensor) and isinstance(value, Tensor) and _is_alike(here, value):
                self._copies.append((here, value))
                self._at[label] = here
            elif slot is not None:
                _refuse_other_kind(label, read(slot), value)
                self._writes.append((slot, value))
            else:
                raise ValueError(
                    f"the checkpoint has {label}, which is not found in the model or the loss; nothing was loaded. "
                    f"Build the step with the model and the loss that saved it."
                )

    def places(self) -> tuple[dict[str, Tensor], list[Slot]]:
        """Where all of it lies: tensors that are written in place, by label, and slots."""
        return dict(self._at), [slot for slot, _ in self._writes]

    def _into_containers(self, slots: Mapping[str, Slot], tensors: Tensors) -> Tensors:
        """Fill containers that can only be replaced as a whole (a tuple, a dataclass). The tensors that are in none."""
        rest = dict(tensors)
        for label in dict.fromkeys(path[: at.start()] for path in tensors for at in re.finditer(r"\[", path)):
            now = read(slots[label]) if label in slots else None
            inside = dict(tensors_in(now, label))
            if type(now) in (list, dict) or not inside or not all(path in rest for path in inside):
                continue
            given = {path: rest.pop(path) for path in inside}
            if all(_is_alike(inside[path], value) for path, value in given.items()):
                self._copies += [(inside[path], value) for path, value in given.items()]
                self._at |= inside
            else:
                self._writes.append((slots[label], filled(form_of(now, label), given)))
        return rest

    def put(self) -> None:
        """Write everything. Call it without gradients."""
        for target, value in self._copies:
            target.copy_(value)
        for slot, value in self._writes:
            if read(slot) is not value:
                write(slot, value)


class KeptNow:
    """What user code keeps, as a checkpoint has it: read where it lies at that moment.

    The step's own state has it only from one step to the next. Before a resumed run's first step, and after a
    `recapture`, no program says where it lies, and a validation may have changed it since the last step.
    """

    def __init__(self, roots: Mapping[str, Any], carried: Carried) -> None:
        self._roots, self._carried = roots, carried
        self._tensors: dict[str, Tensor] = {}
        self._slots: dict[str, Slot] = {}

    def counts(self, slots: Sequence[Slot]) -> None:
        """A step counts the plain numbers in `slots`."""
        self._slots |= {slot.label: slot for slot in slots}

    def given(self, saved: Mapping[str, Any]) -> KeptState:
        """What a checkpoint has of it, checked and not yet written."""
        return KeptState(self._roots, saved.get("carried", {}), saved.get("numbers", {}))

    def put(self, kept: KeptState) -> None:
        """Write it where it was. Call it without gradients."""
        kept.put()
        tensors, slots = kept.places()
        self._tensors |= tensors
        self.counts(slots)

    def now(self) -> dict[str, dict[str, Any]]:
        """The checkpoint's sections ``carried`` and ``numbers``."""
        values = {label: read(slot) for label, slot in self._slots.items()}
        loaded = {path: t for label, value in values.items() for path, t in tensors_in(value, label)}
        tensors = {**self._tensors, **loaded, **self._carried.tensors()}
        numbers = {label: value for label, value in values.items() if value is None or type(value) in _NUMBERS}
        return {
            "carried": {path: t.detach().clone() for path, t in tensors.items()},
            "numbers": {label: value for label, value in numbers.items() if label not in self._carried.replaced},
        }


_NUMBERS = (bool, int, float, str)


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
