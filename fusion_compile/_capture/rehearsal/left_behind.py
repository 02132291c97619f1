"""What two runs in a row left behind, sorted: caches, one-time initialisation, state, numbers, logs that grow."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot, read
from fusion_compile._capture.rehearsal.contents import Change, ChangeKind, Contents
from fusion_compile._capture.rehearsal.own_tensors import StandIns, with_own
from fusion_compile._capture.rehearsal.provenance import Depends, Provenance, keys_of
from fusion_compile._capture.rehearsal.reach import Found, Reach
from fusion_compile._capture.rehearsal.values import PLAIN, before_run, detached, is_equal, is_plain

NO_SLOT = "a tensor that no slot leads to"
IN_A_CACHE = "functools.lru_cache"
"""`Left.where` of what lies in such a cache."""


class Kind(enum.Enum):
    """What a change means for a program that is captured once and run many times."""

    CACHE = "cache"  # set by the first run, or to the same value by each; depends on nothing; may be kept
    DRAWN_ONCE = "drawn once"  # set by the first run from random numbers
    INITIALISED_ONCE = "initialised once"  # set by the first run, which it makes different from later ones
    STATE = "state"  # holds tensors that change at every run, or from the second run on
    NUMBER = "number"  # plain values that change
    GROWS = "grows"  # a container that is longer after each run
    SHRINKS = "shrinks"
    WRITTEN = "written"  # a tensor written in place that is no declared input
    MUTATED = "same object mutated"  # a numpy array
    OWN = "own"  # the model's own parameters or buffers, put there by each run
    ALIAS = "alias"  # holds memory of a parameter: a detached view of it, which follows it in the ordinary loop
    OTHER = "other"  # objects without tensors that change, iterators that gave items


@dataclass(frozen=True)
class Left:
    """One thing that runs left behind.

    Attributes:
        label: ``"model.1.cache[5]"``.
        slot: Where it lies. None for a numpy array's content, an iterator's position, and memory written in place.
        kind: What it means.
        before, after_first, after_second: The values, `MISSING` where there was none, tensors detached; for a slot of
            the key `WHOLE` lists of all values. Tensors have the numbers of their time.
        changed_in: ``(1, 2)``, ``(1,)`` or ``(2,)``.
        depends: What the tensors in the new values depend on.
        where: For memory written in place ``"file:line"`` of the first write, else ``""``.
    """

    label: str
    slot: Slot | None
    kind: Kind
    before: Any
    after_first: Any
    after_second: Any
    changed_in: tuple[int, ...]
    depends: Depends
    where: str = ""
    kept: Any = field(default=None, repr=False)
    """Of a cache, and of the model's own tensors: the object that the first run put into the slot, as it is."""
    own: bool = False
    """Whether a run puts nothing but the model's own parameters and buffers there."""


class Inputs:
    """Tensors that are recognised by their memory."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kept = list(tensors)
        self._keys, self._ids = set(keys_of(kept)), set(map(id, kept))

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and not self._keys.isdisjoint(keys_of([tensor]))

    def is_one(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of them, and not another one of the same memory."""
        return id(tensor) in self._ids


class Runs(NamedTuple):
    """Two runs: contents before the first and between them, the changes of each, and what was seen of tensors.

    `weights`: the declared inputs that stand in the place of parameters and buffers. `parameters`: those of them that
    require a gradient. `drew_outside`: whether the first run drew from Python's, numpy's or another generator that is
    not torch's. `stand_ins`: for which of the model's tensors the clones stand.
    """

    start: Contents
    between: Contents
    first: list[Change]
    second: list[Change]
    provenance: Provenance
    weights: Inputs
    parameters: Inputs
    drew_outside: bool
    stand_ins: StandIns


class _Row(NamedTuple):
    label: str
    slot: Slot | None
    before: Any
    middle: Any
    after: Any
    changed_in: tuple[int, ...]
    change: ChangeKind
    kept: Any


def sort_out(runs: Runs) -> list[Left]:
    """Make one record for each slot that changed, and for each tensor written in place.

    The second run is over, and nothing is put back yet.
    """
    rows = _wholes(runs, list(_rows(runs)))
    records, aliases = [], []
    for row in rows:
        if _is_of_a_clone(runs, row):
            continue
        if _puts_other_data(row):
            records.append(_rewritten(runs, row))
        elif not _holds_clones_alone(runs, row):
            records.append(_sorted(runs, row))
        elif runs.stand_ins and not _holds_a_view(runs, owned := _owned(runs, row)):
            records.append(owned)
        elif _holds_a_view(runs, row):
            aliases.append(_alias(row))
    return records + aliases + list(_written(runs))


def initialised(record: Left) -> Left:
    """`record` as an initialisation: a program that starts with the value set would compute something else."""
    return replace(record, kind=Kind.INITIALISED_ONCE)


def in_a_cache(cache: Found, depends: Depends) -> Left:
    """What the first run left in a cache of ``functools.lru_cache``, from which the second got it."""
    kind = Kind.INITIALISED_ONCE if depends & (Depends.INPUTS | Depends.CPU_READ) else Kind.DRAWN_ONCE
    return Left(f"{cache.label}(…)", None, kind, MISSING, MISSING, MISSING, (1,), depends, IN_A_CACHE)


def tensors_of(record: Left) -> list[Tensor]:
    """The tensors that the first run put into a cache's slot."""
    return _tensors(record.kept)


def is_table(record: Left) -> bool:
    """Whether a slot that held nothing, or something empty, now holds tensors."""
    empty = record.before is MISSING or record.before is None or (type(record.before) is list and not record.before)
    return (empty or (record.slot is not None and record.slot.key is WHOLE)) and bool(_tensors(record.after_first))


def _rows(runs: Runs) -> Iterator[_Row]:
    second = {_identity(change): change for change in runs.second}
    old_holders = {id(holder.value) for holder, _ in runs.start.items()}
    inner = [c for c in runs.second if c.slot is not None and id(c.slot.holder) not in old_holders]
    for change in runs.first:
        again = second.pop(_identity(change), None)
        reach = Reach({"": change.after}, with_globals=False) if type(change.after) not in PLAIN else None
        # A holder or a tensor that the first run made and the second changed: the slot's value is not what it was.
        within = [c for c in inner if reach is not None and c.slot is not None and reach.holds(c.slot.holder)]
        for one in within:
            second.pop(_identity(one), None)
        tensors = [t for _, t in reach.tensors.values()] if reach is not None else []
        rewritten = any(2 in runs.provenance.runs_that_wrote(t) for t in tensors if runs.provenance.was_made(t))
        after = read(change.slot) if change.slot is not None else (again or change).after
        # An average over one batch stays where it is, but the second run has computed it anew.
        computed = type(change.after) is float and after is not change.after
        twice = again is not None or bool(within) or rewritten or computed
        yield _row(runs, change, (change.before, change.after, after), (1, 2) if twice else (1,))
    for change in second.values():
        yield _row(runs, change, (change.before, change.before, change.after), (2,))


def _row(runs: Runs, change: Change, values: tuple[Any, Any, Any], changed_in: tuple[int, ...]) -> _Row:
    before, middle, after = values
    as_it_was = before_run(runs.provenance, 2, middle)
    return _Row(change.label, change.slot, before, as_it_was, detached(after), changed_in, change.kind, middle)


def _identity(change: Change) -> Any:
    return change.label if change.slot is None else change.slot.identity


def _is_of_a_clone(runs: Runs, row: _Row) -> bool:
    """Whether a slot is one of a clone: its gradient, its data."""
    holder = None if row.slot is None else row.slot.holder
    return isinstance(holder, Tensor) and (runs.weights.is_one(holder) or runs.provenance.is_input(holder))


def _holds_clones_alone(runs: Runs, row: _Row) -> bool:
    """Whether a slot holds nothing but what stood in for weights and buffers: a list of the model's parameters."""
    held = _tensors(row.after)
    return bool(held) and all(tensor in runs.weights for tensor in held)


def _owned(runs: Runs, row: _Row) -> Left:
    """What holds the model's own tensors, in the ordinary loop. Where the first run alone puts them there, as a cache
    does, a program may start with them if that is proved."""
    kind = Kind.CACHE if row.changed_in == (1,) else Kind.OWN
    kept = with_own(row.kept, runs.stand_ins.own)
    values = row.before, row.middle, row.after
    return Left(row.label, row.slot, kind, *values, row.changed_in, Depends.NOTHING, kept=kept, own=True)


def _puts_other_data(row: _Row) -> bool:
    """Whether a run put other numbers of one kind into a tensor: ``tensor.data = …``."""
    if row.slot is None or not isinstance(row.slot.holder, Tensor) or row.slot.key != "data":
        return False
    return all(v.shape == row.before.shape and v.dtype == row.before.dtype for v in (row.middle, row.after))


def _rewritten(runs: Runs, row: _Row) -> Left:
    """The same as a write in place, which in the ordinary loop nobody can tell from it who holds no older view."""
    depends = runs.provenance.of(row.kept) | runs.provenance.of(row.after)
    label = row.label.removesuffix(".data")
    values = (row.before.clone(), row.middle, row.after)
    return Left(label, None, _kind_of_a_write(row.changed_in, depends), *values, row.changed_in, depends, label)


def _holds_a_view(runs: Runs, row: _Row | Left) -> bool:
    """Whether a slot holds the memory of a parameter's clone, and not the clone itself: detached, or its ``.data``."""
    held = [t for t in _tensors(row.kept) if not t.requires_grad and not isinstance(t, nn.Parameter)]
    return any(tensor in runs.parameters and not runs.parameters.is_one(tensor) for tensor in held)


def _alias(row: _Row) -> Left:
    return Left(row.label, row.slot, Kind.ALIAS, row.before, row.middle, row.after, row.changed_in, Depends.INPUTS)


def _wholes(runs: Runs, rows: list[_Row]) -> list[_Row]:
    """Merge the changes of one holder where only the whole says what happened: a list of another length, a dictionary
    that gets new keys in each run."""
    kinds = {id(h.value): h for h, _ in runs.start.items() if h.style == "[k]"}
    by_holder: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        if row.slot is not None and id(row.slot.holder) in kinds:
            by_holder[id(row.slot.holder)].append(row)
    merged: dict[int, _Row] = {}
    for identity, group in by_holder.items():
        appeared = {row.changed_in[0] for row in group if row.change is ChangeKind.APPEARED}
        vanished = {row.changed_in[0] for row in group if row.change is ChangeKind.VANISHED}
        is_dict = kinds[identity].is_dict
        whole = any(row.slot is not None and row.slot.key is WHOLE for row in group)
        if whole or (is_dict and (len(appeared) == 2 or len(vanished) == 2)):
            merged[identity] = _whole(runs, group)
    kept = [row for row in rows if row.slot is None or id(row.slot.holder) not in merged]
    return kept + list(merged.values())


def _whole(runs: Runs, group: list[_Row]) -> _Row:
    first = group[0]
    assert first.slot is not None
    holder = first.slot.holder
    before, middle = (_values(contents, holder) for contents in (runs.start, runs.between))
    label = next(h.label for h, _ in runs.start.items() if h.value is holder)
    slot = Slot(holder, WHOLE, label)
    changed = tuple(sorted({n for row in group for n in row.changed_in}))
    as_it_was = before_run(runs.provenance, 2, middle)
    return _Row(label, slot, before, as_it_was, detached(read(slot)), changed, ChangeKind.REPLACED, middle)


def _values(contents: Contents, holder: Any) -> list[Any]:
    for known, items in contents.items():
        if known.value is holder:
            return [value for _, value in items]
    return list(read(Slot(holder, WHOLE, "")))  # the first run put it out of reach


def _sorted(runs: Runs, row: _Row) -> Left:
    depends = Depends.NOTHING
    for tensor in (*_tensors(row.middle), *_tensors(row.after)):
        depends |= runs.provenance.of(tensor)
    kind = _kind(runs, row, depends)
    values = row.before, row.middle, row.after
    return Left(
        row.label, row.slot, kind, *values, row.changed_in, depends, kept=row.kept if kind is Kind.CACHE else None
    )


def _kind(runs: Runs, row: _Row, depends: Depends) -> Kind:
    if row.change is ChangeKind.MUTATED:
        return Kind.MUTATED
    if row.change is ChangeKind.MOVED:
        return Kind.OTHER
    if row.slot is not None and row.slot.key is WHOLE and len(row.changed_in) == 2:
        lengths = len(row.before), len(row.middle), len(row.after)
        if lengths[0] < lengths[1] < lengths[2]:
            return Kind.GROWS
        if lengths[0] > lengths[1] > lengths[2]:
            return Kind.SHRINKS
    if any(map(runs.provenance.is_input, _tensors(row.after))):
        return Kind.STATE  # the batch itself: the same tensor twice here, another one at each step
    if row.changed_in == (1,):
        return _kind_of_the_first_alone(runs, row, depends)
    if _tensors(row.after) or _tensors(row.middle):
        same = row.changed_in == (1, 2) and not depends and is_equal(row.middle, row.after)
        return Kind.CACHE if same and not _is_whole_dict(row) else Kind.STATE
    return Kind.NUMBER if is_plain(row.middle) and is_plain(row.after) else Kind.OTHER


def _kind_of_the_first_alone(runs: Runs, row: _Row, depends: Depends) -> Kind:
    if depends & (Depends.INPUTS | Depends.CPU_READ):
        return Kind.INITIALISED_ONCE
    if depends & Depends.RANDOM:
        return Kind.DRAWN_ONCE
    numbers = type(row.middle) in (float, complex) or bool(_tensors(row.middle)) or type(row.middle) is np.ndarray
    if numbers and runs.drew_outside:
        return Kind.DRAWN_ONCE
    if (numbers or type(row.middle) is int) and 1 in runs.provenance.cpu_reads:
        return Kind.INITIALISED_ONCE
    return Kind.CACHE


def _written(runs: Runs) -> Iterator[Left]:
    tensors = runs.start.tensors()  # as they were: somebody may have put other data into one
    for write in runs.provenance.written(tensors.items()):
        if write.declared:
            continue
        tensor = tensors.get(write.label)
        values = [MISSING] * 3
        depends = Depends.NOTHING
        if tensor is not None:
            values = [runs.provenance.before_run(n, tensor).clone() for n in (1, 2)] + [tensor.detach().clone()]
            depends = runs.provenance.of(tensor)
        kind = _kind_of_a_write(write.runs, depends)
        before, middle, after = values
        yield Left(write.label or NO_SLOT, None, kind, before, middle, after, write.runs, depends, write.where)


def _kind_of_a_write(runs: tuple[int, ...], depends: Depends) -> Kind:
    if runs != (1,):
        return Kind.WRITTEN
    once_random = depends & Depends.RANDOM and not depends & (Depends.INPUTS | Depends.CPU_READ)
    return Kind.DRAWN_ONCE if once_random else Kind.INITIALISED_ONCE


def _is_whole_dict(row: _Row) -> bool:
    return row.slot is not None and row.slot.key is WHOLE and isinstance(row.slot.holder, dict)


def _tensors(value: Any) -> list[Tensor]:
    if type(value) in PLAIN:
        return []
    return [tensor for _, tensor in Reach({"": value}, with_globals=False).tensors.values()]
