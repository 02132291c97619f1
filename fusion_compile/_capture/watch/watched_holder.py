"""A holder that a watch compares with what it held."""

from __future__ import annotations

import collections
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fusion_compile._capture.python_state.holders import Holder
from fusion_compile._capture.python_state.slots import MISSING, WHOLE, class_dict


@dataclass(eq=False)
class WatchedHolder(Holder):
    """A holder with what it held by key: `held`."""

    held: dict[Any, Any] = field(default_factory=dict)

    def remember(self) -> None:
        """What it holds now is what it should hold."""
        self.held = self.contents()

    def contents(self) -> dict[Any, Any]:
        """Key -> present value; keys that hold nothing are left out. A set is one value, under the key `WHOLE`."""
        if self.keys is None:
            if issubclass(type(self.value), dict):
                return dict.copy(self.value)  # without a call of the keys' __hash__
            if issubclass(type(self.value), (set, frozenset)):
                return {WHOLE: frozenset(self.value)}
        return {key: value for key, value in self.items() if value is not MISSING}

    def differences(self) -> Iterator[tuple[Any, Any, Any]]:
        """``(key, before, after)`` of whatever is another object now."""
        now = self.contents()
        for key in [*self.held, *(key for key in now if key not in self.held)]:
            before, after = self.held.get(key, MISSING), now.get(key, MISSING)
            if before is not after and not (isinstance(self.value, (set, frozenset)) and before == after):
                yield key, before, after

    def as_it_was(self) -> Any:
        """A container with what this one held; None for what is no whole dictionary, list, deque or set."""
        kind, held = type(self.value), self.held
        if self.keys is not None or kind not in (dict, list, collections.deque, set):
            return None
        return dict(held) if kind is dict else kind(held.get(WHOLE, ()) if kind is set else held.values())

    def traversed(self) -> Any:
        """What `gc.get_referents` takes apart into the contents."""
        return gc.get_referents(class_dict(self.value))[0] if isinstance(self.value, type) else self.value
