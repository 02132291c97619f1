"""State that user code keeps in Python: tensors in attributes, dictionaries, lists, closures, closed-over modules.

A step carries it from one step to the next like a buffer. It is an input and an output of the program, is saved in a
checkpoint, and a skipped step leaves it alone. Between steps it lies where user code keeps it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._capture.python_state.slots import MISSING, Slot, read, write
from fusion_compile._capture.rehearsal.left_behind import Kind, Left
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._types import Tensors

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class _Shape(NamedTuple):
    """A value without its tensors: containers, plain values, and a tensor's shape, dtype and device."""

    kind: Any
    inner: tuple[Any, ...] = ()


def shape_of(value: Any) -> Hashable:
    """What a program is specialised on: equal for two values that hold tensors of one shape and dtype in one structure.

    Raises TypeError for a value that holds anything but tensors and plain values in lists, tuples and dictionaries.
    """
    if isinstance(value, Tensor):
        return _Shape("tensor", (tuple(value.shape), value.dtype, value.device))
    if value is MISSING or type(value) in _PLAIN:
        return _Shape(type(value), (value,))
    if type(value) in (list, tuple):
        return _Shape(type(value), tuple(map(shape_of, value)))
    if type(value) is dict:
        return _Shape(dict, tuple((key, shape_of(inner)) for key, inner in value.items()))
    raise TypeError(type(value).__name__)


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` of every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield path, value
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            yield from tensors_in(inner, f"{path}[{i}]")
    elif type(value) is dict:
        for key, inner in value.items():
            yield from tensors_in(inner, f"{path}[{key!r}]")


class _At(NamedTuple):
    """Stands for a tensor in a form: where it lies."""

    path: str


def form_of(value: Any, path: str) -> Any:
    """`value` without its tensors, which would keep memory alive, or have none: containers, plain values and paths."""
    if isinstance(value, Tensor):
        return _At(path)
    if type(value) in (list, tuple):
        return type(value)(form_of(inner, f"{path}[{i}]") for i, inner in enumerate(value))
    if type(value) is dict:
        return {key: form_of(inner, f"{path}[{key!r}]") for key, inner in value.items()}
    return value


def filled(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of that `form` with `tensors` (by path) in it."""
    if isinstance(form, _At):
        return tensors[form.path]
    if type(form) in (list, tuple):
        return type(form)(filled(inner, tensors) for inner in form)
    if type(form) is dict:
        return {key: filled(inner, tensors) for key, inner in form.items()}
    return form


@dataclass
class Carried:
    """What one step carries.

    Attributes:
        replaced: Slots whose value each forward replaces, by label.
        written: Tensors that a forward writes in place, with all slots that lead to them, by label. The user's own
            tensor is the state, so that everybody who holds it sees the step's result.
        forms: How the values that `now` last saw hold their tensors, by label.
    """

    replaced: dict[str, Slot] = field(default_factory=dict)
    written: dict[str, tuple[Tensor, tuple[Slot, ...]]] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    _given: dict[str, Any] = field(default_factory=dict)
    _versions: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.replaced or self.written)

    def add(self, records: Sequence[Left], roots: Mapping[str, Any]) -> None:
        """Carry what a rehearsal found to be state.

        Raises ValueError for state that cannot be carried, naming it.
        """
        for record in records:
            if record.kind is Kind.STATE and record.slot is not None:
                if isinstance(record.slot.holder, contextvars.ContextVar) and record.before is MISSING:
                    raise ValueError(
                        f"{record.label} is set by the first forward, and a context variable that was set cannot be "
                        f"unset again; set it before the first step ({record.slot.holder.name}.set(None))."
                    )
                for value in (record.before, record.after_first, record.after_second):
                    try:
                        shape_of(value)
                    except TypeError as kind:
                        raise ValueError(
                            f"{record.label} changes at every forward and holds a {kind}; a step carries tensors and "
                            f"plain values in lists, tuples and dictionaries. Keep a tensor there."
                        ) from None
                self.replaced.setdefault(record.label, record.slot)
                self.written.pop(record.label, None)
        if not any(record.kind is Kind.WRITTEN for record in records):
            return
        reach = Reach(roots)
        by_label = {found.label: found.value for found in reach.tensors.values()}
        for record in records:
            if record.kind is not Kind.WRITTEN or record.label in self.labels():
                continue
            tensor = by_label.get(record.label)
            if tensor is None:
                raise ValueError(
                    f"the forward writes into a tensor in place that nothing reachable from the model or the loss "
                    f"holds ({record.where or record.label}); keep it as a buffer of the model."
                )
            slots = tuple(slot for slot, value in reach.slots() if value is tensor)
            if not slots:
                raise ValueError(
                    f"the forward writes into {record.label} {list(tensor.shape)} in place, which lies in a tuple or "
                    f"another place that cannot be exchanged ({record.where}); keep it as a buffer or an attribute."
                )
            self.written[record.label] = (tensor, slots)

    def labels(self) -> set[str]:
        """What is carried, by label."""
        return {*self.replaced, *self.written}

    def signature(self) -> Hashable:
        """What the program depends on: which slots hold what kind of value."""
        return tuple((label, shape_of(read(slot))) for label, slot in self.replaced.items())

    def tensors(self) -> Tensors:
        """The tensors as user code holds them now, by path."""
        found = dict(pair for label, slot in self.replaced.items() for pair in tensors_in(read(slot), label))
        return {**found, **{label: tensor for label, (tensor, _) in self.written.items()}}

    def tensors_as_held(self) -> Tensors:
        """Inside of `held`: the tensors that user code finds or has left, by path."""
        found = dict(pair for label, slot in self.replaced.items() for pair in tensors_in(read(slot), label))
        return {**found, **{label: read(slots[0]) for label, (_, slots) in self.written.items()}}

    def slots(self) -> list[Slot]:
        """Everywhere that the step writes what it carries."""
        return [*self.replaced.values(), *(slot for _, slots in self.written.values() for slot in slots)]

    def check(self) -> None:
        """Raise RuntimeError if a tensor that the program writes in place is no longer where it was."""
        for label, (tensor, slots) in self.written.items():
            if read(slots[0]) is not tensor:
                raise RuntimeError(
                    f"{label} {list(tensor.shape)} was replaced by another tensor after the step was captured; the "
                    f"program still updates the old one. Copy into it (tensor.copy_) or compile the step again."
                )

    @contextmanager
    def held(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, user code finds `tensors` (by path) where it keeps its own; afterwards its own are back."""
        before = {label: read(slot) for label, slot in self.replaced.items()}
        try:
            for label, slot in self.replaced.items():
                write(slot, filled(form_of(before[label], label), tensors))
            for label, (_, slots) in self.written.items():
                for slot in slots:
                    write(slot, tensors[label])
            yield
        finally:
            for label, slot in self.replaced.items():
                write(slot, before[label])
            for tensor, slots in self.written.values():
                for slot in slots:
                    write(slot, tensor)

    def now(self) -> Tensors:
        """Inside of `held`, after the forward: the tensors by path. How they are held is remembered for `put`."""
        self.forms = {label: form_of(read(slot), label) for label, slot in self.replaced.items()}
        return self.tensors_as_held()

    def put(self, forms: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Give user code what a step computed: values of `forms` with `tensors` (by path), as fresh tensors.

        Fresh, because user code may keep the one before (a history of means).
        """
        for label, form in forms.items():
            new = filled(form, {path: t.detach().clone() for path, t in tensors.items() if _is_of(path, label)})
            write(self.replaced[label], new)
            self._given[label] = new
            self._versions[label] = [t._version for _, t in tensors_in(new, label)]

    def changed_by_the_user(self) -> Tensors:
        """The tensors that somebody replaced or wrote into since `put`, by path."""
        found: Tensors = {}
        for label, slot in self.replaced.items():
            value = read(slot)
            versions = [t._version for _, t in tensors_in(value, label)]
            if value is not self._given.get(label, _NEVER) or versions != self._versions.get(label):
                found |= dict(tensors_in(value, label))
        return found


_NEVER = object()


def _is_of(path: str, label: str) -> bool:
    return path == label or path.startswith(f"{label}[")
