"""Whatever lies in a parameter's memory moves with it: ``w = parameter.data``, a kept view, ``state_dict()``.

Whoever holds such a tensor sees, in the ordinary loop, what the optimizer writes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._shared_memory import left_behind, memory_of, overlapping, part_of
from fusion_compile._state._compat import others_hold
from fusion_compile._tracked import tracked

_staying: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def stay(place: Tensor) -> Tensor:
    """`place` itself, which no move takes along: it says where a parameter was put."""
    _staying[id(place)] = place
    return place


class Move(NamedTuple):
    """`parameter`, called `name`, goes to `place`, which has its shape and dtype."""

    name: str
    parameter: nn.Parameter
    place: Tensor


def move(moves: Sequence[Move], apart: Sequence[Tensor] = ()) -> list[Tensor]:
    """Point each parameter at its place, and with it all tensors that lie in its memory, wherever they are kept.

    A tensor that reaches beyond one parameter (a flat tensor from which several were cut) cannot follow; it is noted in
    `left_behind`. A numpy array stays where it is.

    Args:
        moves: What goes where. The values are there already.
        apart: Of those that `stay`, some that hold the memory.

    Returns:
        Old memory that a numpy array may still read, to be kept alive.
    """
    before: dict[int, list[tuple[Tensor, Tensor]]] = {}
    known = Counter(memory_of(tensor) for tensor in {id(t): t for t in apart}.values())
    for each in moves:
        memory = memory_of(each.parameter)
        if memory is not None and others_hold(each.parameter, known[memory]):
            before.setdefault(memory, []).append((each.parameter.data, each.place))
    for each in moves:
        each.parameter.data = each.place
    if not before:
        return []
    stays = {id(t) for pairs in before.values() for pair in pairs for t in pair}
    kept: list[Tensor] = []
    for tensor in _tensors():
        pairs = (
            () if id(tensor) in stays or _staying.get(id(tensor)) is tensor else before.get(memory_of(tensor) or 0, ())
        )
        if not pairs:
            continue
        if not tensor.untyped_storage().resizable():
            kept.append(pairs[0][0])
        parts = (part_of(tensor.detach(), old, new) for old, new in pairs)
        if (part := next((p for p in parts if p is not None), None)) is not None:
            tensor.data = part
        else:
            left_behind[id(tensor)] = tensor
    return kept


def refuse_two_in_one_place(parameters: dict[str, nn.Parameter]) -> None:
    """Raise ValueError if two trained parameters share entries: an optimizer would update them twice."""
    for names in overlapping(parameters):
        raise ValueError(
            f"{names[0]} {list(parameters[names[0]].shape)} and {names[1]} {list(parameters[names[1]].shape)} are two "
            f"parameters in one memory, and each would be updated on its own. Tie them: assign one Parameter to both "
            f"places; or give each its own memory (.clone())."
        )


def _tensors() -> list[Tensor]:
    found: list[Any] = [each for each in tracked() if issubclass(type(each), Tensor)]
    return [each for each in found if type(each) is Tensor or isinstance(each, torch.nn.Parameter)]
