"""Python numbers that stand in a batch beside its tensors: a guidance scale, an epoch, a size.

A program holds for more than one value of such a number wherever the number only goes into arithmetic on tensors. So
the numbers of the present batch lie in slots, as those lie that a loss counts on, and the loss gets what is there.
"""

from __future__ import annotations

from typing import Any

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._step import batches
from fusion_compile._step.containers import map_leaves


class BatchNumbers:
    """The numbers of the batch of which a step is being taken."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def hold(self, batch: tuple[Any, ...]) -> None:
        """From now on these are the numbers of `batch`."""
        self._held.clear()
        if not batches.are_tensors(batch):
            self._held.update(batches.numbers(batch))

    @property
    def slots(self) -> list[Slot]:
        """Where they lie, in the order of `batches.leaves`, under their paths."""
        return [Slot(self._held, path, path) for path in self._held]

    def put(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """`batch`, a part of the one that is held, with what the slots hold in the places of its numbers."""
        following = iter(list(self._held.values()))
        found: tuple[Any, ...] = map_leaves(
            lambda leaf: next(following) if type(leaf) in batches.NUMBERS else leaf, batch
        )
        return found

    def because(self) -> str:
        """Why a step with these numbers is captured by running it."""
        first, *more = self._held
        return f"{first} is a plain number{f' (and {len(more)} more)' if more else ''}, which reading would fix"
