"""Noticing, between calls, that what was captured is no longer what stands there."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import contains
from typing import Any

import numpy as np
from torch import Tensor

from fusion_compile._capture.python_state.alike import is_alike
from fusion_compile._capture.python_state.holders import name_of
from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot, key_identity, read
from fusion_compile._capture.watch.change import Change, Kind
from fusion_compile._capture.watch.portions import Portion, TensorKinds, kinds_of, portions_of
from fusion_compile._capture.watch.reads import Reads
from fusion_compile._capture.watch.replaceable import kind_of, of_one_kind
from fusion_compile._capture.watch.scope import STEP, Scope
from fusion_compile._capture.watch.torch_settings import SlowSettings, TorchSettings
from fusion_compile._capture.watch.walk import Walk
from fusion_compile._capture.watch.watched_holder import WatchedHolder
from fusion_compile._compat import hooks_registered

_OF_MODULES_AT_ONCE = 1500
_SELDOM_AT_ONCE = 600
"""Values compared in one call."""
_SIZES_AT_ONCE = 500
_GRADIENTS_AT_ONCE = 64
_REPLACEABLE_AT_ONCE = 32
_KINDS_AT_ONCE = 20
"""Tensors looked at in one call: 40 ns for requires_grad, 160 ns for dtype, device and shape."""


class Watch:
    """Compares what a capture was made from with what it was, without looking at the device.

    Compared at each call: everything that was read outside of modules, the contents of containers, closures, defaults
    and partials, the methods that ran, gradient mode, autocast and default dtype; and of modules, parameters, buffers,
    children, hooks, attributes that were read and the number of attributes. Beyond 1,500 values of modules, about 600
    parameters, these take turns of two calls or a few, and so do, 32 at a call, tensors that may be replaced by one of
    their kind. Compared in long turns: attributes that no code read, class
    attributes that no code read, tensors' requires_grad, dtype, device and shape, and torch's precision flags. A change
    says how many calls late it may be. A hook that was registered through torch is noticed at once. All this is for a
    training step; `SAMPLER` compares less, and modules without turns.

    Args:
        roots: Label -> model, loss function, or anything else that the capture ran. The label "" gives a model's
            parameters their own names.
        reads: What the roots read in a real run; None watches every attribute of every object instead.
        frozen: The tensors that the capture holds by identity; None holds all. Any other tensor may be replaced by one
            of its kind.
        scope: What is compared, and whether in turns.
        outside: Slots that are compared too: globals and closures that the capture read, where `reads` are None.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        reads: Reads | None = None,
        frozen: Collection[Tensor] | None = None,
        scope: Scope = STEP,
        outside: Iterable[Slot] = (),
    ) -> None:
        self._roots = dict(roots)
        self._outside = tuple(outside)
        self._scope = scope
        self._reads = reads
        if reads is not None:
            reads.drop_temporaries()
        self._frozen = None if frozen is None else {id(tensor): tensor for tensor in frozen}
        self._excepted: dict[tuple[int, Any], Slot] = {}
        self._loose: dict[tuple[int, Any], WatchedHolder] = {}
        self._reordered: dict[int, WatchedHolder] = {}
        self._settings = TorchSettings(compared=scope.training)
        self.remember()

    def except_(self, slots: Iterable[Slot]) -> None:
        """Stop watching `slots`. What the caller writes itself belongs here: state, numbers that it counts on. The key
        `WHOLE` stands for everything in the holder."""
        self._excepted |= {slot.identity: slot for slot in slots}  # holders stay alive: no other object gets their ids
        self.remember()

    def remember(self) -> None:
        """Take everything as it is now for what was captured."""
        walk = Walk(None if self._reads is None else self._reads.names, self._scope)
        walk.roots(self._roots)
        walk.slots(self._outside if self._reads is None else [*self._reads.slots, *self._outside])
        walk.finish()
        self._loose_values: list[tuple[Slot, Any]] = []
        self._loose_objects: list[Any] = []
        replaceable: list[Slot] = []
        self._partial: list[WatchedHolder] = []
        often, modules, seldom = (
            [kept for holder in holders if (kept := self._kept(holder, replaceable)) is not None]
            for holders in (walk.often, walk.modules, walk.seldom)
        )
        self._replaceable = of_one_kind(replaceable, _REPLACEABLE_AT_ONCE if self._scope.turns else len(replaceable))
        self._weights = walk.weights
        self._often = Portion(often)
        self._modules = portions_of(modules, _OF_MODULES_AT_ONCE) if self._scope.turns else [Portion(modules)]
        self._seldom = portions_of(seldom, _SELDOM_AT_ONCE)
        fixed = [(t, n) for t, n in walk.tensors.values() if self._frozen is None or id(t) in self._frozen]
        kinds = ("dtype", "device", "shape") if self._scope.training else ("dtype", "device")
        gradients = kinds_of(fixed, ("requires_grad",), _GRADIENTS_AT_ONCE) if self._scope.training else []
        self._properties = gradients if self._scope.turns else [*gradients, *kinds_of(fixed, kinds, len(fixed) or 1)]
        self._kinds = kinds_of(fixed, kinds, _KINDS_AT_ONCE) if self._scope.turns else []
        may_grow = {id(slot.holder) for slot in self._excepted.values() if slot.key is WHOLE or read(slot) is MISSING}
        sized = [*walk.sized, *((holder.value, holder.label) for holder in self._partial)]
        self._sized = [(container, label) for container, label in sized if id(container) not in may_grow]
        self._sizes = [len(container) for container, _ in self._sized]
        lots = range(0, len(self._sized), _SIZES_AT_ONCE)
        self._counted = [[container for container, _ in self._sized[i : i + _SIZES_AT_ONCE]] for i in lots]
        self._counts = [sum(self._sizes[i : i + _SIZES_AT_ONCE]) for i in lots]
        self._arrays = [(array, array.tobytes(), name) for array, name in walk.arrays if not self._is_excepted(array)]
        self._called = [(slot, read(slot)) for slot in walk.called if slot.identity not in self._excepted]
        self._missing = [slot for slot in walk.missing if slot.identity not in self._excepted]
        self._missing_from = [slot.holder for slot in self._missing]
        self._missing_keys = [slot.key for slot in self._missing]
        self._fast = self._settings.read_fast()
        self._slow = [SlowSettings(readers) for readers in self._settings.slow_lots()]
        self._hooks = hooks_registered()
        self._call = 0
        self._turns: list[Portion | TensorKinds | SlowSettings] = [*self._seldom, *self._kinds, *self._slow]

    def changed(self) -> Change | None:
        """The first change since `remember`, or None. Says it again at each call until `remember`, or until what was
        changed is put back."""
        self._call += 1
        if self._is_as_it_was():
            return None
        changes = list(self._changes())
        first = next((change for change in changes if change.tensors is None), changes[0] if changes else None)
        if first is None:  # other objects of equal values, or another order
            self._reordered |= {id(h.value): h for h in self._holders() if list(h.contents()) != list(h.held)}
            self.remember()
        return first

    def difference(self) -> Change | None:
        """The change that most likely decides something, of all since `remember`: one of what code read comes first.

        For who knows already that something is another: it compares everything, at no matter what cost.
        """
        changes = [change for change in self._changes() if change.tensors is None]
        return next((change for change in changes if change.read), changes[0] if changes else None)

    def accept(self) -> None:
        """Take everything as it is now for what was captured, like `remember`; quick where nothing changed."""
        lots = (self._often, *self._modules, *self._properties, *self._replaceable, *self._turns)
        counted = list(map(len, (container for container, _ in self._sized))) == self._sizes
        if not (counted and self._small_things_are() and all(lot.is_as_it_was() for lot in lots)):
            self.remember()

    @property
    def turns(self) -> int:
        """Calls after which everything was compared; a change is noticed at most `turns` - 1 calls late."""
        return max(len(self._turns), len(self._properties), len(self._modules), len(self._replaceable))

    @property
    def values(self) -> int:
        """How many values are compared, tensors' properties and torch's settings left out."""
        return sum(len(portion.held) for portion in (self._often, *self._modules, *self._seldom))

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What one call of `changed` compares, part by part, for measuring."""
        lots: list[Sequence[Any]] = [self._modules, self._replaceable, self._turns, self._properties]
        modules, replaceable, turn, properties = (lot[0].is_as_it_was if lot else bool for lot in lots)
        return {
            "settings": self._settings.read_fast,
            "read": self._often.is_as_it_was,
            "modules": modules,
            "lengths": lambda: self._entries_are(0),
            "others": self._small_things_are,
            "replaceable": replaceable,
            "turn": turn,
            "properties": properties,
        }

    def _is_as_it_was(self) -> bool:
        call = self._call
        if self._settings.read_fast() != self._fast or not self._often.is_as_it_was():
            return False
        if self._modules and not self._modules[call % len(self._modules)].is_as_it_was():
            return False
        if not self._entries_are(call):
            return False
        if (hooks := hooks_registered()) != self._hooks:
            if not all(portion.is_as_it_was() for portion in self._seldom):
                return False
            self._hooks = hooks  # somewhere else
        if not self._small_things_are():
            return False
        if self._replaceable and not self._replaceable[call % len(self._replaceable)].is_as_it_was():
            return False
        if self._turns and not self._turns[call % len(self._turns)].is_as_it_was():
            return False
        return not self._properties or self._properties[call % len(self._properties)].is_as_it_was()

    def _late_of(self, lots: Sequence[Any], i: int) -> int:
        """Calls before this one since lot `i` of `lots` was compared, or since `remember`."""
        looked_at = self._call - (self._call - i) % len(lots)
        if looked_at == self._call:
            looked_at -= len(lots)
        return max(0, self._call - 1 - max(0, looked_at))

    def _entries_are(self, call: int) -> bool:
        if not self._counts:
            return True
        lot = call % len(self._counts)
        return sum(map(len, self._counted[lot])) == self._counts[lot]

    def _small_things_are(self) -> bool:
        return (
            not any(map(contains, self._missing_from, self._missing_keys))
            and all(array.tobytes() == before for array, before, _ in self._arrays)
            and all(is_alike(read(slot), before) for slot, before in self._called)
            and all(is_alike(read(slot), before) for slot, before in self._loose_values)
        )

    def _kept(self, holder: WatchedHolder, replaceable: list[Slot]) -> WatchedHolder | None:
        """`holder` without the slots that are excepted, compared by content, or may hold other tensors: `replaceable`
        gets these."""
        if self._is_excepted(holder.value):
            return None
        found = holder.contents()
        left: list[Any] = []
        for key, value in found.items():
            slot = Slot(holder.value, key, holder.label_of(key))
            if slot.identity in self._excepted:
                continue
            if slot.identity in self._loose:
                copied = type(value) in (dict, list, collections.deque, set)
                self._loose_values.append((slot, copy.copy(value) if copied else value))
                self._loose_objects.append(value)
            elif self._frozen is not None and isinstance(value, Tensor) and id(value) not in self._frozen:
                replaceable.append(slot)
            else:
                left.append(key)
        if len(left) == len(found) and id(holder.value) not in self._reordered:
            return holder
        if not isinstance(holder.value, (dict, list, collections.deque, type)):
            return None
        if holder.keys is None and not isinstance(holder.value, type):
            holder.remember()
            self._partial.append(holder)
        return WatchedHolder(holder.value, holder.label, holder.style, tuple(left))

    def _is_excepted(self, container: Any) -> bool:
        return (id(container), key_identity(WHOLE)) in self._excepted

    def _changes(self) -> Iterator[Change]:
        """Every difference. Slow: only when something differs."""
        gone = self._exchanged()
        replaced = [*self._replaced(gone)]
        tensors = _swapped(replaced, self._holders(), self._weights)
        for holder, key, before, after, late in replaced:
            yield self._change(holder.label_of(key), before, after, key=key, late=late, tensors=tensors)
        for turns in (self._properties, self._turns):
            for i, lot in enumerate(turns):
                if not isinstance(lot, Portion):
                    kind: Kind = "tensor" if isinstance(lot, TensorKinds) else "setting"
                    for label, old, new in lot.differences():
                        yield self._change(label, old, new, kind=kind, late=self._late_of(turns, i))
        yield from self._other_changes(gone)

    def _exchanged(self) -> set[int]:
        """Containers, by identity, that were filled and then given up for new ones like those that they were: a cache
        that a context manager of the loss uses (``torch.nn.utils.parametrize.cached``)."""
        was = {id(holder.value): holder for holder in self._holders() if holder.as_it_was() is not None}
        gone: set[int] = set()
        for holder in self._holders():
            for _, before, after in holder.differences():
                old = was.get(id(before))
                if old is not None and type(after) is type(before) and is_alike(after, old.as_it_was()):
                    gone.add(id(before))
        for (slot, value), own in zip(self._loose_values, self._loose_objects, strict=True):
            if (now := read(slot)) is not own and is_alike(now, value):
                gone.add(id(own))
        for holder in self._holders() if gone else ():
            if id(holder.value) not in gone:
                gone.difference_update(map(id, holder.contents().values()))  # somebody has it still
        return gone

    def _replaced(self, gone: set[int]) -> Iterator[tuple[WatchedHolder, Any, Any, Any, int]]:
        registered = hooks_registered() != self._hooks
        counted = {id(container) for container, _ in self._sized}
        for lots in ([self._often], self._modules, self._seldom):
            turns: Sequence[Any] = self._turns if lots is self._seldom else lots  # which begin with them
            for i, portion in enumerate(lots):
                for holder in portion.holders:
                    for key, before, after in holder.differences() if id(holder.value) not in gone else ():
                        slot = Slot(holder.value, key, holder.label_of(key))
                        if slot.identity in self._excepted:
                            continue
                        if id(before) in gone or is_alike(after, before):
                            if read(slot) is after:
                                self._loose[slot.identity] = holder
                        else:
                            late = self._late_of(turns, i)
                            if holder.style == "" and registered:
                                late = 0  # a hook: all are compared when one is registered
                            elif (before is MISSING or after is MISSING) and id(holder.value) in counted:
                                late = min(late, len(self._counts) - 1)  # entries are counted more often
                            yield holder, key, before, after, late

    def _other_changes(self, gone: set[int]) -> Iterator[Change]:
        for holder in self._partial:  # their other keys are compared; these came or went
            for key, before, after in holder.differences():
                slot = Slot(holder.value, key, holder.label_of(key))
                if (before is MISSING or after is MISSING) and slot.identity not in self._excepted:
                    yield self._change(slot.label, before, after, key=key)
        for i, ((container, label), size) in enumerate(zip(self._sized, self._sizes, strict=True)):
            if len(container) != size and id(container) not in gone:
                late = self._late_of(self._counts, i // _SIZES_AT_ONCE)
                yield self._change(f"len({label or 'model'})", size, len(container), kind="length", late=late)
        for slot in self._missing:
            if (now := read(slot)) is not MISSING:
                yield self._change(slot.label, MISSING, now, key=slot.key)
        for array, before, label in self._arrays:
            if array.tobytes() != before:
                yield self._change(label, np.frombuffer(before, array.dtype).tolist(), array.ravel().tolist())
        for slot, old in (*self._called, *self._loose_values):
            if not is_alike(now := read(slot), old):
                yield self._change(slot.label, old, now)
        for i, lot in enumerate(self._replaceable):
            for label, old, new in lot.differences():
                yield self._change(label, old, new, kind="tensor", late=self._late_of(self._replaceable, i))
        for name, old, new in zip(self._settings.fast, self._fast, self._settings.read_fast(), strict=True):
            if old != new:
                yield self._change(name, old, new, kind="setting")

    def _change(
        self,
        label: str,
        before: Any,
        after: Any,
        *,
        key: Any = None,
        kind: Kind = "value",
        late: int = 0,
        tensors: dict[str, Tensor] | None = None,
    ) -> Change:
        name = name_of(key)
        was_read = self._reads is None or not isinstance(name, str) or name in self._reads.names
        return Change(label, before, after, kind, late, was_read, tensors)

    def _holders(self) -> Iterator[WatchedHolder]:
        for portion in (self._often, *self._modules, *self._seldom):
            yield from portion.holders


_Replaced = tuple[WatchedHolder, Any, Any, Any, int]


def _swapped(
    replaced: list[_Replaced], holders: Iterable[WatchedHolder], weights: Collection[int]
) -> dict[str, Tensor] | None:
    """The new tensors by name if `replaced` is an exchange of parameters and buffers alone; else None."""
    for holder, _, before, after, _ in replaced:
        if id(holder.value) not in weights or not (isinstance(before, Tensor) and isinstance(after, Tensor)):
            return None
        if type(after) is not type(before) or kind_of(before)[1:3] != kind_of(after)[1:3]:
            return None
        is_empty = not before.numel()  # its memory was given away
        if not is_empty and (after.shape != before.shape or after.stride() != before.stride()):
            return None
    new = {(id(holder.value), key): after for holder, key, _, after, _ in replaced}
    old_ties, new_ties = [], []
    for holder in holders:
        for key, value in holder.held.items():
            if isinstance(value, Tensor):
                old_ties.append(value)
                new_ties.append(new.get((id(holder.value), key), value))
    if not replaced or _ties(old_ties) != _ties(new_ties):
        return None
    return {holder.label_of(key): after for holder, key, _, after, _ in replaced}


def _ties(tensors: Iterable[Tensor]) -> list[int]:
    """For each tensor the place where it is first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]
