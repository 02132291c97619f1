"""One request of a sampler and what was computed for it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion_compile._types import Tensors


class Part:
    """What one stage that runs once, and one that runs for each row, have computed so far.

    `tables`: by buffer name, ``[capacity, total]`` or ``[1, total]``. `known`: values that other stages read, the same
    for all rows. `per_row`: such values of each row. `once`, `done`: whether the first stage has run, and the rows for
    which the second has.
    """

    def __init__(self) -> None:
        self.tables: Tensors = {}
        self.known: Tensors = {}
        self.per_row: dict[int, Tensors] = {}
        self.once = False
        self.done: set[int] = set()


class RequestSlot(Part):
    """The part of one request: `remember` says which, and empties it."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: tuple[Tensor, ...] | None = None
        self._identities: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    @property
    def is_live(self) -> bool:
        """Whether the slot stands for a request."""
        return self._asked is not None

    def remember(self, asked: Mapping[str, Tensor]) -> None:
        """The slot is for `asked` (request inputs by name); nothing is computed yet."""
        self.known = {name: t.detach().clone() for name, t in asked.items()}
        self.once, self.done = False, set()
        self._asked = tuple(self.known.values())
        self._identify(tuple(asked.values()))

    def is_same_object(self, asked: Sequence[Tensor]) -> bool:
        """Whether `asked` are the very tensors remembered, unchanged since; costs no look at the device."""
        return (
            self._asked is not None
            and len(self._identities) == len(asked)
            and all(
                ref() is t and version == _version(t) for (ref, version), t in zip(self._identities, asked, strict=True)
            )
        )

    def is_equal(self, asked: Sequence[Tensor]) -> bool:
        """Whether `asked` holds the same numbers; on a GPU this waits for the device."""
        if self._asked is None or not all(map(torch.equal, self._asked, asked)):
            return False
        self._identify(asked)
        return True

    def _identify(self, asked: Sequence[Tensor]) -> None:
        tracked = all(_version(t) is not None for t in asked)
        self._identities = tuple((weakref.ref(t), _version(t) or 0) for t in asked) if tracked else ()


def _version(t: Tensor) -> int | None:
    """None for an inference tensor, which counts no versions; its contents are compared at every call."""
    return None if t.is_inference() else t._version
