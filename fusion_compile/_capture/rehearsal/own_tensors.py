"""The model's own parameters and buffers, where a run leaves the clones that stood in their place.

A forward that keeps ``list(self.parameters())`` keeps what stands in the module while it runs. In the ordinary loop
that is the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.holders import Holder
from fusion_compile._capture.python_state.slots import Slot, built_in, write
from fusion_compile._capture.rehearsal._compat import storage_key
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._shared_memory import part_of

Own = Callable[[Tensor], Tensor]
"""From a tensor to the model's own, for which it stands; any other tensor is itself."""


class StandIns:
    """Clones, each with the tensor for which it stands.

    A parameter's clone is known by its identity. A buffer's clone is known by its memory, as each run goes on from a
    detached one. A view of a clone stands for the same view of the model's own.

    Args:
        pairs: The clone, and the model's own tensor.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._pairs = list(pairs)  # an id is a name only while its object lives
        self._by_id = {id(clone): own for clone, own in self._pairs}
        self._by_memory = {_place(clone): own for clone, own in self._pairs if not clone.requires_grad}
        self._by_storage = {storage_key(clone): (clone, own) for clone, own in self._pairs}

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def own(self, tensor: Tensor) -> Tensor:
        """The model's own tensor for which `tensor` stands, or its part, or `tensor`."""
        found = self._by_id.get(id(tensor))
        if found is None and self._by_memory and not tensor.requires_grad:
            found = self._by_memory.get(_place(tensor))
        if found is None and not isinstance(tensor, nn.Parameter):
            found = self._part(tensor)
        return tensor if found is None else found

    def _part(self, view: Tensor) -> Tensor | None:
        clone, own = self._by_storage.get(storage_key(view), (view, view))
        if clone is view or storage_key(view) == storage_key(own):
            return None
        with torch.set_grad_enabled(view.requires_grad):
            return part_of(view, clone, own if view.requires_grad else own.detach())


def _place(tensor: Tensor) -> Any:
    key = storage_key(tensor)
    return id(tensor) if key is None else (key, tensor.shape, tensor.stride(), tensor.storage_offset())


def with_own(value: Any, own: Own) -> Any:
    """`value` with the model's own tensors in the place of those that stand for them.

    Containers and objects are written in place; a tuple that changes is a new one of its class.
    """
    if isinstance(value, Tensor):
        return own(value)
    if isinstance(value, tuple):
        inner = [with_own(each, own) for each in value]
        if all(new is old for new, old in zip(inner, value, strict=True)):
            return value
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    for holder in Reach({"": value}, with_globals=False).holders:
        if not isinstance(holder.value, Tensor):
            _write_own(holder, own)
    return value


def _write_own(holder: Holder, own: Own) -> None:
    """Write own tensors into one holder: its values, the tuples among them, the keys of a dictionary."""
    before = holder.items()
    after = [
        (own(key) if isinstance(key, Tensor) else key, with_own(v, own) if isinstance(v, (Tensor, tuple)) else v)
        for key, v in before
    ]
    if issubclass(type(holder.value), set) or any(k is not j for (k, _), (j, _) in zip(before, after, strict=True)):
        if any(v is not w for pair, new in zip(before, after, strict=True) for v, w in zip(pair, new, strict=True)):
            fill: Any = built_in(type(holder.value))
            fill.clear(holder.value)
            fill.update(holder.value, [v for _, v in after] if issubclass(type(holder.value), set) else after)
        return
    for (key, old), (_, new) in zip(before, after, strict=True):
        if new is not old:
            write(Slot(holder.value, key, ""), new)
