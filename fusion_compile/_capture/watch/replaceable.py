"""Slots that may hold another tensor, if it is one of the same kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fusion_compile._capture.python_state.slots import Slot, read
from fusion_compile._capture.watch.change import Described


class OneKind:
    """Slots, and the kind of tensor that each holds: gradient or none, dtype, device and shape."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = list(slots)
        self._kinds = self._now()

    def is_as_it_was(self) -> bool:
        """Whether each slot holds a tensor of its kind; 0.4 µs a slot."""
        return self._now() == self._kinds

    def differences(self) -> Iterator[tuple[str, Any, Any]]:
        """``(label, before, after)``, described for people."""
        for slot, before, after in zip(self._slots, self._kinds, self._now(), strict=True):
            if before != after:
                yield slot.label, _described(before), _described(after)

    def _now(self) -> list[tuple[Any, ...]]:
        return list(map(kind_of, map(read, self._slots)))


def of_one_kind(slots: Sequence[Slot], at_once: int) -> list[OneKind]:
    """`slots` in lots of at most `at_once`."""
    return [OneKind(slots[i : i + at_once]) for i in range(0, len(slots), at_once)] if slots else []


def kind_of(value: Any) -> tuple[Any, ...]:
    """Of a tensor whether it requires a gradient, its dtype, device and shape; anything else is a kind of its own."""
    return (value.requires_grad, value.dtype, value.device, value.shape) if isinstance(value, Tensor) else (value,)


def _described(kind: tuple[Any, ...]) -> Any:
    """What `kind_of` gave, for people."""
    if len(kind) == 1:
        return kind[0]
    gradient, dtype, device, shape = kind
    learnable = ", which requires a gradient" if gradient else ""
    return Described(f"a tensor {tuple(shape)} of {dtype} on {device}{learnable}")
