"""One request of a sampler and the values computed for it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion_compile._types import Tensors


class Part:
    """The values computed so far by one stage that runs once and one stage that runs for each row.

    `tables`: by buffer name, ``[capacity, total]`` or ``[1, total]``. `known`: values that other stages read, the same
    for all rows. `per_row`: row -> such values of this row. `once`: whether the first stage has run. `done`: the rows
    for which the second stage has run.
    """

    def __init__(self) -> None:
        self.tables: Tensors = {}
        self.known: Tensors = {}
        self.per_row: dict[int, Tensors] = {}
        self.once = False
        self.done: set[int] = set()


class RequestSlot(Part):
    """The part of one request, which `assign` sets."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: tuple[Tensor, ...] | None = None
        self._identities: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    @property
    def is_live(self) -> bool:
        """Whether the slot is assigned to a request."""
        return self._asked is not None

    def assign(self, asked: Mapping[str, Tensor]) -> None:
        """Empty the slot and assign it to the request `asked` (inputs by name)."""
        self.known = {name: t.detach().clone() for name, t in asked.items()}
        self.once, self.done = False, set()
        self._asked = tuple(self.known.values())
        self._identify(tuple(asked.values()))

    def is_same_object(self, asked: Sequence[Tensor]) -> bool:
        """Whether `asked` are the same tensor objects, unchanged since; does not look at the device."""
        return (
            self._asked is not None
            and len(self._identities) == len(asked)
            and all(
                ref() is t and version == _version(t) for (ref, version), t in zip(self._identities, asked, strict=True)
            )
        )

    def is_equal(self, asked: Sequence[Tensor]) -> bool:
        """Whether `asked` holds equal numbers; on a GPU this waits for the device."""
        if self._asked is None or not all(map(torch.equal, self._asked, asked)):
            return False
        self._identify(asked)
        return True

    def _identify(self, asked: Sequence[Tensor]) -> None:
        tracked = all(_version(t) is not None for t in asked)
        self._identities = tuple((weakref.ref(t), _version(t) or 0) for t in asked) if tracked else ()


def _version(t: Tensor) -> int | None:
    """The version, or None for an inference tensor, whose contents are compared at every call."""
    return None if t.is_inference() else t._version
