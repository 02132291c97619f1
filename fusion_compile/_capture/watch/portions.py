"""Holders compared with what they held, all at once and in C."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, getitem, itemgetter
from typing import Any

from torch import Tensor

from fusion_compile._capture.python_state.slots import MISSING
from fusion_compile._capture.watch.identity import SameObjects
from fusion_compile._capture.watch.watched_holder import WatchedHolder

_FEW_KEYS = 2
"""Up to so many keys of one dictionary are looked up one by one, which is as fast as together."""


class Portion:
    """Holders that are compared together.

    The garbage collector lists what a container refers to at 4 ns an object, for containers of every kind and without
    a call for each; single keys cost 15 ns.
    """

    def __init__(self, holders: Sequence[WatchedHolder]) -> None:
        self.holders = holders
        for holder in holders:
            holder.remember()
        self._wholes = tuple(holder.traversed() for holder in holders if holder.keys is None)
        groups: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        self._containers: list[Any] = []
        self._keys: list[Any] = []
        self._of_subclasses: list[tuple[dict[Any, Any], tuple[Any, ...]]] = []
        for holder in holders:
            if holder.keys is not None:
                if isinstance(holder.value, dict) and type(holder.value) is not dict:
                    self._of_subclasses.append((holder.value, holder.keys))
                elif len(holder.keys) > _FEW_KEYS and type(holder.value) is dict:
                    groups[holder.keys].append(holder.value)
                else:
                    self._containers += [holder.traversed()] * len(holder.keys)
                    self._keys += holder.keys
        self._groups = [(itemgetter(*keys), containers) for keys, containers in groups.items()]
        self._is_same = SameObjects(self._now())

    @property
    def held(self) -> tuple[Any, ...]:
        """Every value that is compared."""
        return self._is_same.values

    def is_as_it_was(self) -> bool:
        """Whether every value is the same object."""
        try:
            return self._is_same(self._now())
        except (KeyError, IndexError):
            return False

    def _now(self) -> list[Any]:
        found = gc.get_referents(*self._wholes)
        for getter, containers in self._groups:
            found.extend(chain.from_iterable(map(getter, containers)))
        found.extend(map(getitem, self._containers, self._keys))
        for container, keys in self._of_subclasses:  # whose [] may be anything
            found.extend(dict.get(container, key, MISSING) for key in keys)
        return found


class TensorKinds:
    """Properties of tensors that change without the tensor being replaced."""

    def __init__(self, tensors: Sequence[tuple[Tensor, str]], properties: tuple[str, ...]) -> None:
        self.tensors = [tensor for tensor, _ in tensors]
        self.labels = [label for _, label in tensors]
        self.properties = properties
        self._get = attrgetter(*properties)
        self.kinds = list(map(self._get, self.tensors))

    def is_as_it_was(self) -> bool:
        """Whether no property is another."""
        return list(map(self._get, self.tensors)) == self.kinds

    def differences(self) -> Iterator[tuple[str, Any, Any]]:
        """``(label.property, before, after)``."""
        for tensor, label, before in zip(self.tensors, self.labels, self.kinds, strict=True):
            after = self._get(tensor)
            pairs = zip(before, after, strict=True) if len(self.properties) > 1 else [(before, after)]
            for name, (old, new) in zip(self.properties, pairs, strict=True):
                if old != new:
                    yield f"{label}.{name}", old, new


def portions_of(holders: Sequence[WatchedHolder], at_once: int) -> list[Portion]:
    """`holders` in portions of about `at_once` values, each of which costs 4 to 13 ns."""
    found: list[Portion] = []
    at, count = 0, 0
    for i, holder in enumerate(holders):
        count += 2 + (len(gc.get_referents(holder.traversed())) if holder.keys is None else 4 * len(holder.keys))
        if count >= at_once:
            found.append(Portion(holders[at : i + 1]))
            at, count = i + 1, 0
    return [*found, Portion(holders[at:])] if at < len(holders) else found


def kinds_of(tensors: Sequence[tuple[Tensor, str]], properties: tuple[str, ...], at_once: int) -> list[TensorKinds]:
    """`tensors` in lots of at most `at_once`."""
    return [TensorKinds(tensors[i : i + at_once], properties) for i in range(0, len(tensors), at_once)]
