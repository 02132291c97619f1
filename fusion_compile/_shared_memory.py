"""Tensors that lie in one memory: a view kept beside its base, ``parameter.data`` in an attribute.

In the ordinary loop whoever holds a part of a tensor's memory sees what is written there. A step computes on other
tensors than the module's own, and moves parameters to other memory; both owe that such a part is the part of what
stands there now.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

left_behind: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""By identity, tensors whose memory parameters have left, and that could not follow: they are no part of one alone."""


def memory_of(tensor: Tensor) -> int | None:
    """What two tensors in one memory have in common; None for what has no strided memory of its own to look at."""
    kind = type(tensor)
    if not (kind is Tensor or issubclass(kind, (nn.Parameter, nn.Buffer))) or tensor.layout is not torch.strided:
        return None
    try:
        memory: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # inside of vmap, or oneDNN's
        return None
    return memory


def part_of(view: Tensor, original: Tensor, value: Tensor) -> Tensor | None:
    """What `view`, which lies in the memory of `original`, is in `value`, which stands in the place of `original`.

    Returns:
        A view of `value`, differentiable if that is; None where `view` reaches beyond `original` or reads its numbers
        as others, or where `value` lies in another order than `original`.
    """
    if view.dtype != original.dtype or view.is_conj() != original.is_conj() or view.is_neg() != original.is_neg():
        return None
    at = view.storage_offset() - original.storage_offset()
    if not _is_dense(original) or at < 0 or at + _span(view) > _span(original):
        return None
    if original.shape != value.shape or _steps(original) != _steps(value):
        return None
    if view.shape == original.shape and _steps(view) == _steps(original):
        return value.view_as(value)
    if value.is_contiguous() and view.is_contiguous():
        return value.view(-1)[at : at + view.numel()].view(view.shape)
    return value.as_strided(view.size(), view.stride(), value.storage_offset() + at)


def whole_of(tensors: Mapping[str, Tensor]) -> dict[str, str | None]:
    """By name, for tensors that lie in one memory with others of `tensors` and overlap them: the one of which it is a
    part, which may be itself; None where none holds them all."""
    found: dict[str, str | None] = {}
    for names in _overlapping(tensors):
        first = min(tensors[name].storage_offset() for name in names)
        last = max(_end(tensors[name]) for name in names)
        wholes = [n for n in names if _is_dense(tensors[n]) and _ends(tensors[n]) == (first, last)]
        kinds = {tensors[name].dtype for name in names}
        found |= dict.fromkeys(names, wholes[0] if wholes and len(kinds) == 1 else None)
    return found


def parts_in(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By name, those of `tensors` that are parts of another one, and the name of that."""
    return {name: whole for name, whole in whole_of(tensors).items() if whole is not None and whole != name}


def sharing(
    originals: Mapping[str, Tensor], values: Mapping[str, Tensor], parts: Mapping[str, str]
) -> dict[str, Tensor]:
    """`values`, which stand in the places of `originals`, with the `parts` of `originals` (of `parts_in`) as their
    parts."""
    shared = dict(values)
    for name, whole in parts.items():
        if whole in values:
            part = part_of(originals[name], originals[whole], values[whole])
            shared |= {} if part is None else {name: part}
    return shared


def overlapping(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors that share entries, group by group."""
    return list(_overlapping(tensors))


def _overlapping(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    by_memory: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and (key := memory_of(tensor)) is not None:
            by_memory.setdefault(key, []).append(name)
    for names in by_memory.values():
        group, reach = list[str](), 0
        for name in sorted(names, key=lambda n: _ends(tensors[n])):
            if group and tensors[name].storage_offset() >= reach:
                if len(group) > 1:
                    yield group
                group, reach = [], 0
            group.append(name)
            reach = max(reach, _end(tensors[name]))
        if len(group) > 1:
            yield group


def _ends(tensor: Tensor) -> tuple[int, int]:
    return int(tensor.storage_offset()), _end(tensor)


def _end(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) + _span(tensor)


def _span(tensor: Tensor) -> int:
    """How many entries lie between a tensor's first and its last, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, each entry once."""
    wanted = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and step != wanted:
            return False
        wanted *= size
    return True


def _steps(tensor: Tensor) -> list[int]:
    """Strides that count: an axis of one entry may have any."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
