"""Plain numbers that are positions: ``queue[n : n + 8] = keys``, ``table[n]``, ``narrow``, ``select`` and ``arange``.

Torch would take the number's value at once. So indexing is looked at as a whole, where Python asks for it: which one
number it depends on, along which axis, and what must hold so that only the position differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GET: Any = Tensor.__getitem__
_SET: Any = Tensor.__setitem__
_NARROW: tuple[Any, ...] = (Tensor.narrow, torch.narrow)
_SELECT: tuple[Any, ...] = (Tensor.select, torch.select)
_NAMES = {"narrow": ("self", "dim", "start", "length"), "select": ("self", "dim", "index")}


class Indexing(NamedTuple):
    """One call that takes or writes a part of a tensor by ints and slices.

    Attributes:
        tensor: What is indexed; None for ``arange``, whose result is a part of all numbers.
        elements: Of the index: ints, slices, None and Ellipsis.
        values: Of a write, the value in a tuple; else empty.
        options: Of ``arange``, its keywords.
    """

    tensor: Tensor | None
    elements: tuple[Any, ...]
    values: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012

    def numbers(self) -> Iterator[Any]:
        """All that may be an int, in order; None, Ellipsis and steps stand for themselves."""
        for element in self.elements:
            yield from (element.start, element.stop, element.step) if type(element) is slice else (element,)

    def map(self, plain: Callable[[Any], Any]) -> Indexing:
        """The same of other numbers."""
        index = tuple(
            slice(plain(e.start), plain(e.stop), plain(e.step)) if type(e) is slice else plain(e) for e in self.elements
        )
        return self._replace(elements=index, values=tuple(map(plain, self.values)))

    def do(self) -> Any:
        """What the call does, with plain numbers."""
        if self.tensor is None:
            return torch.arange(self.elements[0].start, self.elements[0].stop, **self.options)
        if self.values:
            return _SET(self.tensor, self.elements, self.values[0])
        return _GET(self.tensor, self.elements)


class Position(NamedTuple):
    """The one place in an indexing that a number decides.

    Attributes:
        around: The index with everything along that axis.
        axis: The axis, in what `around` gives.
        size: Entries along it; None for ``arange``.
        start: The first entry.
        stop: Behind the last entry; None where one entry is taken and the axis goes.
        beyond: Where a slice ends behind the last entry of all, which it may; `stop` is then the size.
    """

    around: tuple[Any, ...]
    axis: int
    size: int | None
    start: Any
    stop: Any
    beyond: Any = None


def indexing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], follows: Callable[[Any], bool]) -> Any:
    """The call as `Indexing`, or None for another call, and for indices of another kind (tensors, lists, booleans).

    `follows`: whether a value stands for an int.
    """
    found: Indexing | None = None
    if func in (_GET, _SET) and not kwargs:
        index = args[1] if type(args[1]) is tuple else (args[1],)
        found = Indexing(args[0], index, tuple(args[2:]))
    elif func in _NARROW or func in _SELECT:
        names = _NAMES["narrow" if func in _NARROW else "select"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensor, dim = given.get("self", given.get("input")), given.get("dim")
        if isinstance(tensor, Tensor) and type(dim) is int and tensor.ndim:
            before = (slice(None),) * (dim % tensor.ndim)
            at = given.get("index") if func in _SELECT else slice(given["start"], given["start"] + given["length"])
            found = Indexing(tensor, (*before, at))
    elif func is torch.arange and len(args) in (1, 2) and not {"start", "end", "step", "out"} & kwargs.keys():
        start, stop = args if len(args) == 2 else (0, args[0])
        found = Indexing(None, (slice(start, stop),), (), kwargs)
    if found is None or not all(_is_position(n, follows) for n in found.numbers()):
        return None
    return found


def position(call: Indexing, follows: Callable[[Any], bool], plain: Callable[[Any], Any]) -> Position | None:
    """Where `call` depends on a number that `follows`; None where it does in another way than a `Position` says.
    `plain`: the value of a number, whether it follows or not."""
    moving = [e for e in call.elements if any(map(follows, (e.start, e.stop, e.step) if type(e) is slice else (e,)))]
    if len(moving) != 1:
        return None
    one = moving[0]
    if call.tensor is None:
        return Position((), 0, None, one.start, one.stop)
    known = sum(e is not None and e is not Ellipsis for e in call.elements)
    inside = outside = 0
    found: Position | None = None
    around: list[Any] = []
    for element in call.elements:
        if element is one:
            size = call.tensor.shape[inside]
            start, stop = (one.start, one.stop) if type(one) is slice else (one, None)
            if type(one) is slice:
                start, stop = 0 if start is None else start, size if stop is None else stop
            fits = type(size) is int and (type(one) is not slice or one.step in (None, 1))
            beyond = stop if fits and stop is not None and plain(stop) > size else None
            found = Position((), outside, size, start, stop if beyond is None else size, beyond) if fits else None
        around.append(slice(None) if element is one else element)
        skipped = call.tensor.ndim - known if element is Ellipsis else int(element is not None)
        inside += skipped
        outside += 1 if element is None else skipped if element is one or type(element) is not int else 0
    return None if found is None else found._replace(around=tuple(around))


def _is_position(value: Any, follows: Callable[[Any], bool]) -> bool:
    return value is None or value is Ellipsis or type(value) is int or follows(value)
