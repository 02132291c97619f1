"""State that user code keeps in Python: tensors in attributes, dictionaries, lists, closures, closed-over modules.

A step carries it from one step to the next like a buffer. It is an input and an output of the program, is saved in a
checkpoint, and a skipped step leaves it alone. Between steps it lies where user code keeps it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from fusion_compile._capture.by_running.leaves import StandingIn, standing_for, standing_in
from fusion_compile._capture.python_state.slots import MISSING, Slot, read, write
from fusion_compile._capture.rehearsal.left_behind import Kind, Left
from fusion_compile._capture.rehearsal.own_tensors import StandIns, with_own
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._compat import is_of_a_trace
from fusion_compile._step.carried_values import (
    COUNTED,
    Key,
    Own,
    PartOf,
    Place,
    filled,
    form_of,
    part,
    shape_of,
    tensors_in,
    with_part,
)
from fusion_compile._types import Tensors


@dataclass
class Carried:
    """What one step carries.

    Attributes:
        model: Whose parameters are themselves wherever user code keeps them, and no state.
        replaced: Slots whose value each forward replaces, by label.
        written: Tensors that a forward writes in place, with all slots that lead to them, by label. The user's own
            tensor is the state, so that everybody who holds it sees the step's result.
        forms: How the values that `now` last saw hold their tensors, by label.
        counted: Where plain numbers that are counted on lie inside of what is replaced, by label.
        owned: Slots that each forward fills with the model's own parameters or buffers.
    """

    model: nn.Module | None = None
    replaced: dict[str, Slot] = field(default_factory=dict)
    written: dict[str, tuple[Tensor, tuple[Slot, ...]]] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, list[Key]] = field(default_factory=dict)
    owned: dict[str, Slot] = field(default_factory=dict)
    trained: list[Tensor] = field(default_factory=list)
    """Inside of `held`: learnable tensors that the loss trains itself, where Python runs."""
    _standing: StandingIn | None = None
    _given: dict[str, Any] = field(default_factory=dict)
    _versions: dict[str, list[int]] = field(default_factory=dict)
    _own: Own = field(default_factory=dict)
    _programs: dict[Hashable, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._own = {} if self.model is None else {id(p): p for p in self.model.parameters()}

    def __bool__(self) -> bool:
        return bool(self.replaced or self.written)

    def add(self, records: Sequence[Left], roots: Mapping[str, Any]) -> None:
        """Carry what a rehearsal found to be state.

        A tensor that a forward writes in place may lie where nothing can be exchanged (a tuple): wherever torch is
        handed it, it gets the step's.

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
                        shape_of(value, self._own)
                    except TypeError as kind:
                        raise ValueError(
                            f"{record.label} changes at every forward and holds a {kind}; a step carries tensors and "
                            f"plain values in lists, tuples, dictionaries and dataclasses. Keep a tensor there."
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
            self.written[record.label] = (tensor, slots)

    def own(self, records: Sequence[Left]) -> None:
        """Each forward fills these slots with the model's own tensors."""
        self.owned |= {record.label: record.slot for record in records if record.slot is not None}

    def count(self, slots: Iterable[Slot]) -> None:
        """These numbers are counted on; some may lie inside of what is replaced."""
        outer = {slot.identity: label for label, slot in self.replaced.items()}
        for slot in slots:
            if isinstance(slot.holder, PartOf) and (label := outer.get(slot.holder.slot.identity)) is not None:
                keys = self.counted.setdefault(label, [])
                if slot.key not in keys:
                    keys.append(slot.key)

    def without_numbers(self, forms: Mapping[str, Any]) -> dict[str, Any]:
        """`forms` for a step that does not run Python: the numbers are what was counted."""
        return {label: self._with(label, form, lambda key: COUNTED) for label, form in forms.items()}

    def _with(self, label: str, value: Any, number: Callable[[Key], Any]) -> Any:
        """`value` with other numbers in the places of those that are counted on; MISSING leaves one as it is."""
        for key in self.counted.get(label, ()):
            if (new := number(key)) is not MISSING:
                value = with_part(value, key, new)
        return value

    def labels(self) -> set[str]:
        """What is carried, by label."""
        return {*self.replaced, *self.written}

    def holds_tensors_alone(self) -> bool:
        """Whether user code keeps tensors and nothing beside them, now and after the forward that `now` last saw."""
        held = [read(slot) for slot in self.replaced.values()]
        return all(isinstance(value, (Tensor, Place)) for value in (*held, *self.forms.values()))

    def signature(self) -> Hashable:
        """What the program depends on: which slots hold what kind of value."""
        return tuple((label, self._shape(label, slot)) for label, slot in self.replaced.items())

    def _shape(self, label: str, slot: Slot) -> Hashable:
        value = read(slot)
        return shape_of(self._with(label, value, lambda key: type(part(value, key))), self._own)

    def refuse_more_programs(self, bound: int, of: Hashable) -> None:
        """Raise ValueError if a program would be one too many, as plain numbers that lie beside tensors are others at
        each step. `of`: what else the program is for."""
        alike = tuple(shape_of(read(slot), self._own, numbers=False) for slot in self.replaced.values())
        known = self._programs.setdefault((of, alike), [])
        now = self.signature()
        if now in known:
            return
        if len(known) >= bound:
            last = dict(known[-1])
            label = next(label for label, slot in self.replaced.items() if self._shape(label, slot) != last[label])
            raise ValueError(
                f"{label} holds a plain number beside tensors, which is another at each step, and each has a program "
                f"of its own: this would be number {bound + 1}. Keep the number in an attribute of its own, where it "
                f"is counted on, or in a 0-dim tensor."
            )
        known.append(now)

    def tensors(self) -> Tensors:
        """The tensors as user code holds them now, by path."""
        found = dict(pair for label, slot in self.replaced.items() for pair in tensors_in(read(slot), label, self._own))
        return {**found, **{label: tensor for label, (tensor, _) in self.written.items()}}

    def tensors_as_held(self) -> Tensors:
        """Inside of `held`: the tensors that user code finds or has left, by path."""
        found = dict(pair for label, slot in self.replaced.items() for pair in tensors_in(read(slot), label, self._own))
        standing = self._standing
        assert standing is not None or not self.written
        return {**found, **{n: standing.now(tensor, slots).detach() for n, (tensor, slots) in self.written.items()}}  # type: ignore[union-attr]

    def slots(self) -> list[Slot]:
        """Everywhere that the step writes what it carries."""
        return [*self.replaced.values(), *(slot for _, slots in self.written.values() for slot in slots)]

    def check(self) -> None:
        """Raise RuntimeError if a tensor that the program writes in place is no longer where it was."""
        for label, (tensor, slots) in self.written.items():
            if slots and read(slots[0]) is not tensor:
                raise RuntimeError(
                    f"{label} {list(tensor.shape)} was replaced by another tensor after the step was captured; the "
                    f"program still updates the old one. Copy into it (tensor.copy_) or compile the step again."
                )

    @contextmanager
    def held(
        self, tensors: Mapping[str, Tensor], stand_ins: Sequence[tuple[Tensor, Tensor]] = (), *, goes_on: bool = False
    ) -> Iterator[None]:
        """Inside, user code finds `tensors` (by path) where it keeps its own; afterwards its own are back.

        `stand_ins`: what stands for the model's own parameters and buffers inside, and these. What is `owned` holds the
        model's own afterwards, or their parts. `goes_on`: from the part of the batch before, as `now` found it there:
        what that made first, no slot holds yet.
        """
        known = self._own
        own = {**known, **{id(standing): tensor for standing, tensor in stand_ins}}
        before = {label: read(slot) for label, slot in self.replaced.items()}
        given = {label: _standing_for(tensor, tensors[label]) for label, (tensor, _) in self.written.items()}
        there = {label: tensor.data for label, (tensor, _) in self.written.items() if given[label] is tensor}
        self.trained = [given[label] for label in there]
        self._standing = StandingIn({n: (tensor, given[n]) for n, (tensor, _) in self.written.items()})
        self._own = own
        for label in there:
            given[label].data = tensors[label]
        try:
            for label, slot in self.replaced.items():
                write(slot, filled(self.forms[label] if goes_on else form_of(before[label], label, known), tensors))
            for label, (_, slots) in self.written.items():
                for slot in slots:
                    write(slot, given[label])
            with standing_in(self._standing) if given else nullcontext():
                yield
        finally:
            for label, slot in self.replaced.items():
                after = read(slot)  # the numbers in it go on, from one part of the batch to the next
                write(slot, self._with(label, before[label], partial(part, after)))
            for label, (tensor, slots) in self.written.items():
                if label in there:
                    tensor.data = there[label]
                for slot in slots:
                    write(slot, tensor)
            whose = StandIns(stand_ins) if self.owned else None
            for slot in self.owned.values():
                if (value := read(slot)) is not MISSING and (new := with_own(value, whose.own)) is not value:  # type: ignore[union-attr]
                    write(slot, new)
            self._standing, self._own, self.trained = None, known, []

    def now(self) -> Tensors:
        """Inside of `held`, after the forward: the tensors by path. How they are held is remembered for `put`."""
        self.forms = {label: form_of(read(slot), label, self._own) for label, slot in self.replaced.items()}
        return self.tensors_as_held()

    def put(self, forms: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Give user code what a step computed: values of `forms` with `tensors` (by path), as fresh tensors.

        Fresh, because user code may keep the one before (a history of means).
        """
        for label, form in forms.items():
            kept = read(self.replaced[label])
            new = filled(form, {path: t.detach().clone() for path, t in tensors.items() if _is_of(path, label)})
            new = self._with(label, new, partial(_counted_in, form, kept))
            write(self.replaced[label], new)
            self._given[label] = new
            self._versions[label] = [t._version for _, t in tensors_in(new, label, self._own)]

    def changed_by_the_user(self) -> Tensors:
        """The tensors that somebody replaced or wrote into since `put`, by path."""
        found: Tensors = {}
        for label, slot in self.replaced.items():
            value = read(slot)
            versions = [t._version for _, t in tensors_in(value, label, self._own)]
            if value is not self._given.get(label, _NEVER) or versions != self._versions.get(label):
                found |= dict(tensors_in(value, label, self._own))
        return found


_NEVER = object()


def _standing_for(tensor: Tensor, value: Tensor) -> Tensor:
    """What stands for a tensor that a forward writes. Where Python runs, a learnable one is itself with other data, as
    its optimizer knows it by identity; a trace does not follow an optimizer, and has a tensor that is not learnable."""
    is_itself = tensor.requires_grad and tensor.is_leaf and not is_of_a_trace(value)
    return tensor if is_itself else standing_for(tensor, value)


def _counted_in(form: Any, kept: Any, key: Key) -> Any:
    """The number at `key` in `kept`, if `form` says that it was counted on."""
    return part(kept, key) if part(form, key) is COUNTED else MISSING


def _is_of(path: str, label: str) -> bool:
    return path == label or path.startswith(f"{label}[")
