"""State that user code keeps in Python, from a checkpoint: found by its label, and put back where it was."""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import MISSING, Slot, read, refill, write
from fusion_compile._capture.rehearsal.provenance import keys_of
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._step.carried import Carried
from fusion_compile._step.carried_values import PartOf, filled, form_of, part, tensors_in
from fusion_compile._types import Tensors

_ITEM = re.compile(r"^(?P<label>.*)\[(?P<key>\d+|'[^']*'|\"[^\"]*\"|True|False|None|-?[\d.e+-]+)\]$")
_MODULE_PARTS = ("_modules", "_parameters", "_buffers")


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
        self._generators: dict[str, tuple[torch.Generator, Tensor]] = {}
        if not tensors and not numbers:
            return
        reach = Reach(roots)
        places = _Places(reach, tensors)
        drawn_from = _generators(reach)
        for path in [path for path in tensors if path.endswith(_GENERATOR) and path in drawn_from]:
            self._generators[path] = drawn_from[path], tensors[path]
        tensors = {path: tensor for path, tensor in tensors.items() if path not in self._generators}
        for label, value in {**places.grouped(self._into_containers(places, tensors)), **numbers}.items():
            here, slot = places.tensor(label), places.slot(label)
            apart = slot is not None and places.is_anothers(here)
            if isinstance(here, Tensor) and isinstance(value, Tensor) and _is_alike(here, value) and not apart:
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

    def generators(self) -> dict[str, torch.Generator]:
        """The loss's own generators that get a state, by the name of it."""
        return {path: generator for path, (generator, _) in self._generators.items()}

    def places(self) -> tuple[dict[str, Tensor], list[Slot]]:
        """Where all of it lies: tensors that are written in place, by label, and slots."""
        return dict(self._at), [slot for slot, _ in self._writes]

    def _into_containers(self, places: _Places, tensors: Tensors) -> Tensors:
        """Fill containers that can only be replaced as a whole (a tuple, a dataclass). The tensors that are in none."""
        rest = dict(tensors)
        for label in dict.fromkeys(path[: at.start()] for path in tensors for at in re.finditer(r"\[", path)):
            slot = places.present(label)
            now = None if slot is None else read(slot)
            inside = dict(tensors_in(now, label))
            saved = {path for path in rest if path.startswith(f"{label}[")}
            if slot is None or type(now) in (list, dict) or not inside or saved != inside.keys():
                continue
            given = {path: rest.pop(path) for path in inside}
            if all(_is_alike(inside[path], value) for path, value in given.items()):
                self._copies += [(inside[path], value) for path, value in given.items()]
                self._at |= inside
            else:
                self._writes.append((slot, filled(form_of(now, label), given)))
        return rest

    def put(self) -> None:
        """Write everything. Call it without gradients."""
        for generator, state in self._generators.values():
            generator.set_state(state.cpu())
        for target, value in self._copies:
            target.copy_(value)
        for slot, value in self._writes:
            now = read(slot)
            if isinstance(value, list) and type(now) in (list, collections.deque):
                refill(now, value)  # its other owners see it too, and a deque keeps its bound
            elif isinstance(value, dict) and type(now) is dict:
                now.update(value)
            elif now is not value:
                write(slot, tuple(value) if isinstance(value, list) and type(now) is tuple else value)


class KeptNow:
    """What user code keeps, as a checkpoint has it: read where it lies at that moment.

    The step's own state has it only from one step to the next. Before a resumed run's first step, and after a
    `recapture`, no program says where it lies, and a validation may have changed it since the last step.
    """

    def __init__(self, roots: Mapping[str, Any], carried: Carried) -> None:
        self._roots, self._carried = roots, carried
        self._tensors: dict[str, Tensor] = {}
        self._slots: dict[str, Slot] = {}
        self._generators: dict[str, torch.Generator] = {}

    def draws_from(self, labels: Collection[str]) -> None:
        """A step draws random numbers from the generators of these labels; those of the loss's own are kept."""
        if own := {label + _GENERATOR for label in labels if not label.startswith(_KEPT_ELSEWHERE)}:
            self._generators |= {path: g for path, g in _generators(Reach(self._roots)).items() if path in own}

    def counts(self, slots: Sequence[Slot]) -> None:
        """A step counts the plain numbers in `slots`."""
        self._slots |= {slot.label: slot for slot in slots}

    def given(self, saved: Mapping[str, Any]) -> KeptState:
        """What a checkpoint has of it, checked and not yet written."""
        return KeptState(self._roots, saved.get("carried", {}), saved.get("numbers", {}))

    def put(self, kept: KeptState) -> None:
        """Write it where it was. Call it without gradients."""
        kept.put()
        self._generators |= kept.generators()
        tensors, slots = kept.places()
        self._tensors |= tensors
        self.counts(slots)

    def now(self) -> dict[str, dict[str, Any]]:
        """The checkpoint's sections ``carried`` and ``numbers``."""
        values = {label: read(slot) for label, slot in self._slots.items()}
        loaded = {path: t for label, value in values.items() for path, t in tensors_in(value, label)}
        tensors = {**self._tensors, **loaded, **self._carried.tensors()}
        tensors |= {path: generator.get_state() for path, generator in self._generators.items()}
        numbers = {label: value for label, value in values.items() if value is None or type(value) in _NUMBERS}
        return {
            "carried": {path: t.detach().clone() for path, t in tensors.items()},
            "numbers": {label: value for label, value in numbers.items() if label not in self._carried.replaced},
        }


_NUMBERS = (bool, int, float, str)
_GENERATOR = " (state of a torch.Generator)"
_KEPT_ELSEWHERE = ("torch's generator", "Python's generator", "numpy's generator")


def _generators(reach: Reach) -> dict[str, torch.Generator]:
    """The torch generators that user code holds, by the name that a checkpoint gives their state."""
    found = reach.generators.values()
    return {one.label + _GENERATOR: one.value for one in found if isinstance(one.value, torch.Generator)}


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


class _Places:
    """Where the labels of a checkpoint lead, in what was reached."""

    def __init__(self, reach: Reach, saved: Tensors) -> None:
        self._slots = {slot.label: slot for slot, _ in reach.slots()}
        self._tensors = {found.label: found.value for found in reach.tensors.values()}
        others = [t for label, t in self._tensors.items() if label not in saved and isinstance(t, nn.Parameter)]
        self._of_others = set(keys_of(others))
        parts = {id(own.get(part)) for _, own in reach.instances for part in _MODULE_PARTS}
        holders = [h for h in reach.holders if isinstance(h.value, dict) and id(h.value) not in parts]
        self._attributes = {h.label: h.value for h in holders if h.style == ".k"}
        self._items = {h.label: h.value for h in holders if h.style == "[k]"}

    def tensor(self, label: str) -> Tensor | None:
        """The tensor that goes by that label."""
        return self._tensors.get(label)

    def is_anothers(self, tensor: object) -> bool:
        """Whether a tensor lies in the memory of a parameter that the checkpoint does not have as state: until its
        first forward, what ``torch.nn.utils.spectral_norm`` computes is the weight that it computes it from."""
        return isinstance(tensor, Tensor) and not self._of_others.isdisjoint(keys_of([tensor]))

    def present(self, label: str) -> Slot | None:
        """The slot of that label, where it exists."""
        return self._slots.get(label)

    def slot(self, label: str) -> Slot | None:
        """The slot of that label. An attribute or an entry may be absent, of an object or dictionary that is there."""
        if label in self._slots:
            return self._slots[label]
        if (inside := self._inside(label)) is not None:
            return inside
        if (item := _ITEM.match(label)) is not None:
            owner, key = self._items.get(item["label"]), ast.literal_eval(item["key"])
        else:
            before, _, key = label.rpartition(".")
            owner = self._attributes.get(before) if key.isidentifier() else None
        return None if owner is None else Slot(owner, key, label)

    def _inside(self, label: str) -> Slot | None:
        """The slot of a number in a tuple or another container that can only be replaced as a whole."""
        for at in re.finditer(r"\[", label):
            outer = self._slots.get(label[: at.start()])
            key = tuple(re.findall(r"\[[^\]]*\]", label[at.start() :]))
            if outer is not None and part(read(outer), key) is not MISSING:
                return Slot(PartOf(outer), key, label)
        return None

    def grouped(self, tensors: Tensors) -> dict[str, Any]:
        """``{"m.mem[0]": a, "m.mem[1]": b, "m.mean": c}`` -> ``{"m.mem": [a, b], "m.mean": c}``: items of a list that
        is not as long now, and entries of a dictionary that is not there, are one value."""
        whole: dict[str, Any] = {}
        inside: dict[str, dict[Any, tuple[str, Tensor]]] = {}
        for path, tensor in tensors.items():
            item = _ITEM.match(path)
            if item is None:
                whole[path] = tensor
            else:
                inside.setdefault(item["label"], {})[ast.literal_eval(item["key"])] = path, tensor
        for label, items in inside.items():
            values = {key: tensor for key, (_, tensor) in items.items()}
            if self._are_all_there(label, items):
                whole |= dict(items.values())
            elif list(range(len(values))) == sorted(key for key in values if type(key) is int):
                whole[label] = [values[i] for i in range(len(values))]
            elif (slot := self.slot(label)) is not None and any(read(slot) is none for none in (None, MISSING)):
                whole[label] = values
            else:
                whole |= dict(items.values())
        return whole

    def _are_all_there(self, label: str, items: Mapping[Any, tuple[str, Tensor]]) -> bool:
        slot = self._slots.get(label)
        if slot is not None and type(read(slot)) is tuple:
            return all((t := self.tensor(path)) is not None and _is_alike(t, value) for path, value in items.values())
        return all(path in self._slots for path, _ in items.values())


def _refuse_other_kind(label: str, now: Any, value: Any) -> None:
    """Raise ValueError for a value that a checkpoint cannot have, or that is no number where user code counts."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if all(isinstance(v, Tensor) for v in inner):
        return
    counts = isinstance(now, int | float) and not isinstance(now, bool)
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not (fits if counts else value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(
            f"the checkpoint has {value!r} for {label}, which is {now!r} here; nothing was loaded. Give what "
            f"state_dict() gave."
        )
