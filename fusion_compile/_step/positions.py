"""Plain numbers that are positions, while a step is captured: an input of the program takes or writes the part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusion_compile._capture.numbers.positions import Indexing, Position, indexing, position


@dataclass
class _Taken:
    """A part that was taken at a position: a copy, where the ordinary loop has a view."""

    copy: Tensor
    call: Indexing
    found: Position
    own_version: int
    version: int


class CannotFollow(ValueError):
    """A position is used in a way that no program at another position repeats."""


class PositionsFollowed(TorchFunctionMode):
    """Inside, indexing by a number that is followed goes by a tensor: ``queue[n : n + 8] = keys`` is ``index_copy_``.

    A part that is taken is a copy. What is written into it is written through; the copy is not used after its base was
    written otherwise, or `CannotFollow` is raised.

    Args:
        is_followed: Whether a value stands for a plain number.
        plain: The value of a number, whether it is followed or not.
        tensor_of: The 0-dim tensor for a followed number, of its own dtype.
    """

    def __init__(
        self, is_followed: Callable[[Any], bool], plain: Callable[[Any], Any], tensor_of: Callable[[Any], Tensor]
    ) -> None:
        super().__init__()
        self._is_followed, self._plain, self._tensor_of = is_followed, plain, tensor_of
        self._taken: dict[int, _Taken] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        self._refuse_stale(args, given)
        call = indexing(func, args, given, self._is_followed)
        if call is None or not any(map(self._is_followed, call.numbers())):
            out = func(*args, **given)
            self._write_through()
            return out
        found = position(call, self._is_followed, self._plain)
        if found is None:
            raise CannotFollow("more than a position depends on it")
        if call.tensor is None:
            return torch.arange(self._length(found), **call.options) + self._start(found)
        if call.values:
            self._write(call.tensor, found, call.values[0])
            self._write_through()
            return None
        return self._take(call, found)

    def _start(self, found: Position) -> Tensor:
        """The first entry, as a tensor on the CPU or where the inputs lie."""
        return self._tensor_of(found.start) if self._is_followed(found.start) else torch.tensor(found.start)

    def _length(self, found: Position) -> int:
        return int(self._plain(found.stop)) - int(self._plain(found.start)) if found.stop is not None else 1

    def _rows(self, base: Tensor, found: Position) -> Tensor:
        start = self._start(found).to(base.device)
        return start.reshape(1) if found.stop is None else torch.arange(self._length(found), device=base.device) + start

    def _take(self, call: Indexing, found: Position) -> Tensor:
        base = call.tensor
        assert base is not None
        along = base[found.around]
        copy = along.index_select(found.axis, self._rows(base, found))
        if found.stop is None:
            copy = copy.squeeze(found.axis)
        self._taken[copy.untyped_storage()._cdata] = _Taken(copy, call, found, copy._version, base._version)
        return copy

    def _write(self, base: Tensor, found: Position, value: Any) -> None:
        along = base[found.around]
        shape = list(along.shape)
        shape[found.axis] = self._length(found)
        if found.stop is None:
            del shape[found.axis]
        if self._is_followed(value):
            value = self._tensor_of(value)
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=along.dtype, device=along.device)
        while value.ndim > len(shape) and value.shape[0] == 1:
            value = value[0]
        value = value.to(device=along.device, dtype=along.dtype).expand(shape)
        if found.stop is None:
            value = value.unsqueeze(found.axis)
        along.index_copy_(found.axis, self._rows(base, found), value)

    def _write_through(self) -> None:
        """What user code wrote into a part is written where the part was taken."""
        for taken in self._taken.values():
            if taken.copy._version != taken.own_version:
                assert taken.call.tensor is not None
                self._write(taken.call.tensor, taken.found, taken.copy)
                taken.own_version, taken.version = taken.copy._version, taken.call.tensor._version

    def _refuse_stale(self, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._taken:
            return
        for value in (*args, *kwargs.values()):
            for leaf in value if type(value) in (list, tuple) else (value,):
                taken = self._taken.get(leaf.untyped_storage()._cdata) if _has_storage(leaf) else None
                if taken is not None and taken.call.tensor is not None and taken.call.tensor._version != taken.version:
                    raise CannotFollow(
                        "a part that was taken at it is used after the whole was written; take a clone() of the part"
                    )


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided
