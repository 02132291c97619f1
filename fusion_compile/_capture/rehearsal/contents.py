"""What everything reachable holds, remembered by content, compared later, and put back in place."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state._compat import global_module_hooks, without_torch_function
from fusion_compile._capture.python_state.alike import is_alike
from fusion_compile._capture.python_state.attributes import instance_dict, set_instance_dict
from fusion_compile._capture.python_state.holders import Holder, Items
from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot, key_identity
from fusion_compile._capture.rehearsal._compat import storage_key
from fusion_compile._capture.rehearsal.iterators import copy_of, index_of, position
from fusion_compile._capture.rehearsal.random_states import RandomStates
from fusion_compile._capture.rehearsal.reach import Found, Reach
from fusion_compile._compat import is_of_a_trace

ARRAY_BYTES = 1 << 20
"""A numpy array of more bytes than this is not remembered."""


class ChangeKind(enum.Enum):
    """How a slot's value differs from what was remembered."""

    APPEARED = "appeared"
    VANISHED = "vanished"
    REPLACED = "replaced"
    GREW = "grew"
    SHRANK = "shrank"
    MUTATED = "mutated"  # a numpy array: the same object, other numbers
    MOVED = "moved"  # an iterator gave items


class Change(NamedTuple):
    """One slot that differs. `before` and `after` are values, or lists of all values where the slot's key is `WHOLE`.
    `slot` is None where no slot says it: a numpy array's content, an iterator's position."""

    label: str
    slot: Slot | None
    before: Any
    after: Any
    kind: ChangeKind


class _KeptTensor(NamedTuple):
    label: str
    tensor: Tensor
    alias: Tensor  # of the same memory, before anybody assigns .data
    requires_grad: bool
    was_leaf: bool


class _KeptIterator(NamedTuple):
    label: str
    iterator: Any
    position: Any
    state: int | None  # with which it is set back
    copy: Any  # goes on from there

    @classmethod
    def of(cls, found: Found) -> _KeptIterator:
        iterator = found.value
        return cls(found.label, iterator, position(iterator), index_of(iterator), copy_of(iterator))

    def has_moved(self) -> bool:
        return bool(position(self.iterator) != self.position)


class Contents:
    """The contents of all that can be reached from `roots`, and then from `last`, at the time of construction.

    Remembered are holders by shallow copies, ``.data``, ``requires_grad`` and ``.grad`` of tensors, numpy arrays of up
    to `ARRAY_BYTES`, positions of iterators, and the states of all random number generators. The numbers inside of
    tensors are not: `provenance` keeps those that a run writes.

    Restoring puts the same objects back into the same holders, but for iterators of which only a copy stands where they
    stood. Three things it cannot do: a Python generator, and an iterator that can be neither set back nor copied, or
    that lies in a tuple or in another iterator, has given its items (`not_put_back` lists them); an
    ``lru_cache`` cannot lose single entries, so one that was filled is cleared; a file is a file.
    """

    def __init__(self, roots: Mapping[str, Any], last: Mapping[str, Any] | None = None) -> None:
        self.reach = Reach({**roots, **{label: hooks for label, hooks in global_module_hooks().items() if hooks}}, last)
        with without_torch_function():
            self._before: list[tuple[Holder, Items]] = [(holder, holder.items()) for holder in self.reach.holders]
            self._tensors = [kept for kept in map(_kept_tensor, self.reach.tensors.values()) if kept is not None]
        self._arrays = [(*found, found.value.copy()) for found in self.reach.arrays.values() if _is_kept(found.value)]
        self._caches = [(found.value, found.value.cache_info().misses) for found in self.reach.caches.values()]
        self._iterators = [_KeptIterator.of(found) for found in self._all_iterators()]
        self._random = RandomStates(self.reach.generators.values())

    def items(self) -> list[tuple[Holder, Items]]:
        """What every holder held."""
        return self._before

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its label; of a dense one an alias of the memory that it had."""
        return {**dict(self.reach.tensors.values()), **{kept.label: kept.alias for kept in self._tensors}}

    def moved_generators(self) -> list[str]:
        """The labels of the random number generators whose state is no longer as it was."""
        return self._random.moved()

    def drew_outside_torch(self) -> bool:
        """Whether a generator of Python's or numpy's moved, a user's own included."""
        return self._random.moved_outside_torch()

    def filled_caches(self) -> list[Any]:
        """The caches of ``functools.lru_cache`` that computed something since."""
        return [cache for cache, misses in self._caches if cache.cache_info().misses != misses]

    def changes(self) -> list[Change]:
        """What is no longer as it was. A plain value that is equal to the old one is not a change."""
        found: list[Change] = []
        with without_torch_function():
            for holder, before in self._before:
                found += _compared(self.reach, holder, before, holder.items())
            for kept in self._tensors:
                if not _has_same_data(kept):
                    slot = Slot(kept.tensor, "data", f"{kept.label}.data")
                    found.append(Change(slot.label, slot, kept.alias, kept.tensor.detach(), ChangeKind.REPLACED))
                if kept.tensor.requires_grad != kept.requires_grad:
                    slot = Slot(kept.tensor, "requires_grad", f"{kept.label}.requires_grad")
                    now = kept.tensor.requires_grad
                    found.append(Change(slot.label, slot, kept.requires_grad, now, ChangeKind.REPLACED))
        for label, array, copy in self._arrays:
            if array.tobytes() != copy.tobytes():
                found.append(Change(label, None, copy, array.copy(), ChangeKind.MUTATED))
        for kept_it in self._iterators:
            if (now := position(kept_it.iterator)) != kept_it.position:
                found.append(Change(kept_it.label, None, kept_it.position, now, ChangeKind.MOVED))
        return found

    def restore(self, keep: Collection[Slot] = (), keep_caches: Collection[Any] = ()) -> None:
        """Put everything back in place.

        Args:
            keep: Slots that stay as they are now.
            keep_caches: Caches of ``functools.lru_cache`` that stay filled.
        """
        kept = {slot.identity for slot in keep}
        self._exchange_iterators()
        with without_torch_function():
            for value, attributes in self.reach.instances:
                if instance_dict(value) is not attributes:  # somebody wrote self.__dict__ = …
                    set_instance_dict(value, attributes)
            for holder, before in self._before:
                holder.put(before, kept)
            for tensor in self._tensors:
                _put_tensor_back(tensor)
        for _, array, copy in self._arrays:
            if array.flags.writeable:
                np.copyto(array, copy)
        spared = set(map(id, keep_caches))
        for cache in self.filled_caches():
            if id(cache) not in spared:
                cache.cache_clear()
        for each in self._iterators:
            if each.state is not None and position(each.iterator) != each.position:
                each.iterator.__setstate__(each.state)
        self._random.restore()

    def not_put_back(self) -> list[str]:
        """The labels of the iterators that gave items and cannot be set back."""
        return [each.label for each in self._iterators if position(each.iterator) != each.position]

    def _all_iterators(self) -> list[Found]:
        return [found for found in self.reach.iterators.values() if position(found.value) is not None]

    def _exchange_iterators(self) -> None:
        """Have copies of iterators that were moved on, and cannot be set back, put in their places."""
        moved = {id(each.iterator): each for each in self._iterators if each.copy is not None and each.has_moved()}
        if not moved:
            return
        held = {id(value) for _, items in self._before for _, value in items}
        fresh = {key: copy_of(each.copy) for key, each in moved.items() if key in held}
        self._before = [(h, [(k, fresh.get(id(v), v)) for k, v in items]) for h, items in self._before]
        labels = {moved[key].label for key in fresh}
        now = [e._replace(iterator=fresh.get(id(e.iterator), e.iterator)) for e in self._iterators]
        # Those inside of one that was exchanged go by its label, and belong to nobody now.
        self._iterators = [e for e in now if e.label not in labels or any(e.iterator is new for new in fresh.values())]


@contextlib.contextmanager
def as_it_was(roots: Mapping[str, Any]) -> Iterator[None]:
    """At the end, put back what can be reached from `roots`, also after an error: no tensor of a trace stays there."""
    contents = Contents(roots)
    try:
        yield
    finally:
        contents.restore()


def holds_fake(roots: Mapping[str, Any]) -> list[str]:
    """The labels of all tensors without data, those of a trace, that can be reached from `roots`."""
    tensors = Reach(roots).tensors.values()
    return [label for label, tensor in tensors if is_of_a_trace(tensor)]


def _compared(reach: Reach, holder: Holder, before: Items, now: Items) -> list[Change]:
    if len(before) == len(now) and all(v is w and k is j for (k, v), (j, w) in zip(before, now, strict=True)):
        return []
    if holder.is_sequence and (len(before) != len(now) or issubclass(type(holder.value), set)):
        old, new = [value for _, value in before], [value for _, value in now]
        if len(old) == len(new) and {key_identity(v) for v in old} == {key_identity(v) for v in new}:
            return []
        kinds = {-1: ChangeKind.SHRANK, 0: ChangeKind.REPLACED, 1: ChangeKind.GREW}
        return [_change(reach, holder, (WHOLE, old, new), kinds[(len(new) > len(old)) - (len(new) < len(old))])]
    was = {key_identity(key): (key, value) for key, value in before}
    has = {key_identity(key): (key, value) for key, value in now}
    found = []
    for identity, (key, old_value) in was.items():
        _, new_value = has.pop(identity, (key, MISSING))
        if not is_alike(old_value, new_value):
            gone = ChangeKind.VANISHED if new_value is MISSING else ChangeKind.REPLACED
            kind = ChangeKind.APPEARED if old_value is MISSING else gone
            found.append(_change(reach, holder, (key, old_value, new_value), kind))
    found += [_change(reach, holder, (key, MISSING, value), ChangeKind.APPEARED) for key, value in has.values()]
    return found


def _change(reach: Reach, holder: Holder, slot: tuple[Any, Any, Any], kind: ChangeKind) -> Change:
    key, before, after = slot
    labelled = Slot(holder.value, key, reach.slot_label(holder, key))
    return Change(labelled.label, labelled, before, after, kind)


def _kept_tensor(found: Found) -> _KeptTensor | None:
    tensor = found.value
    if type(tensor) not in (Tensor, nn.Parameter) or is_of_a_trace(tensor):
        return None
    return _KeptTensor(found.label, tensor, tensor.detach(), tensor.requires_grad, tensor.is_leaf)


def _has_same_data(kept: _KeptTensor) -> bool:
    tensor, alias = kept.tensor, kept.alias
    if tensor.dtype != alias.dtype or tensor.shape != alias.shape or tensor.device != alias.device:
        return False
    if tensor.layout is not torch.strided:
        return True
    same_view = tensor.stride() == alias.stride() and tensor.storage_offset() == alias.storage_offset()
    return same_view and storage_key(tensor) == storage_key(alias)


def _put_tensor_back(kept: _KeptTensor) -> None:
    tensor = kept.tensor
    if kept.was_leaf and not tensor.is_leaf:  # written in place by what has a gradient: it holds the run's graph
        tensor.detach_()
    if tensor.is_leaf and tensor.requires_grad != kept.requires_grad:
        tensor.requires_grad_(kept.requires_grad)
    if not _has_same_data(kept):
        tensor.data = kept.alias


def _is_kept(array: Any) -> bool:
    return bool(array.nbytes <= ARRAY_BYTES and not array.dtype.hasobject)
