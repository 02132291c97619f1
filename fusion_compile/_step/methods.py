"""Methods that ran when a step was captured by reading: Dynamo's guards do not notice a class that is patched."""

from __future__ import annotations

import types
from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import nn

from fusion_compile._capture.python_state.slots import Slot

_METHODS = (types.FunctionType, staticmethod, classmethod, property)


class Methods:
    """The methods of classes that user code went through.

    Args:
        slots: What was read in a real run.
        model: Its modules' ``forward`` counts too, which torch looks up out of sight.
    """

    def __init__(self, slots: Iterable[Slot], model: nn.Module) -> None:
        found: dict[tuple[int, str], tuple[type, str]] = {}
        for slot in slots:
            if isinstance(slot.holder, type) and isinstance(slot.key, str):
                found[id(slot.holder), slot.key] = (slot.holder, slot.key)
        for module in model.modules():
            owner = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), None)
            if owner is not None:
                found[id(owner), "forward"] = (owner, "forward")
        kept = [(kind, name) for kind, name in found.values() if isinstance(vars(kind).get(name), _METHODS)]
        self._classes = [kind for kind, _ in kept]
        self._names = [name for _, name in kept]
        self._dicts = [vars(kind) for kind in self._classes]
        self._before = self._now()

    def _now(self) -> list[Any]:
        return [own.get(name) for own, name in zip(self._dicts, self._names, strict=True)]

    def check(self) -> None:
        """Raise RuntimeError naming the first method that was replaced. 50 ns a method."""
        now = self._now()
        if not all(map(is_, now, self._before)):
            i = next(i for i, (a, b) in enumerate(zip(now, self._before, strict=True)) if a is not b)
            raise RuntimeError(
                f"{self._classes[i].__qualname__}.{self._names[i]} was replaced after the step was compiled, and the "
                f"program runs the old one. Replace it before compile_training_step(), or compile the step again."
            )
