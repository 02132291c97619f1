"""Notice that a module is no longer the one that was traced: other children, parameters, attributes, hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_DEPTH = 3
"""Containers in containers that are looked into."""


@dataclass(frozen=True)
class StructureChange:
    """`what`: what was changed, as the beginning of a sentence. `tensors`: full name -> the new tensor, if only
    parameters and buffers were replaced, each by one of the same dtype, device and shape, and tied ones by tied ones;
    otherwise None."""

    what: str
    tensors: dict[str, Tensor] | None


class StructureWatch:
    """Compares `model` with its earlier self, by identity, without looking at the device.

    Watched are children, parameters and buffers with their dtypes and devices, ``training``, hooks, and a ``forward``
    of an instance. For modules that are not torch's own, attributes are watched too: plain values, and lists, dicts and
    objects with their contents (LoRA's scales, switches and merged adapters; attention processors). A new attribute is
    not seen, as no trace has read it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.accept_current()

    def accept_current(self) -> None:
        """Compare with the model as it is now: the programs are made from it."""
        self._holders: list[Any] = []  # dicts and lists; parallel to the next two: holder[key] was value
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._labels: list[tuple[str, str]] = []
        self._sized: list[Any] = []
        self._empty: list[Any] = []
        self._dicts: list[dict[str, Any]] = []  # of modules without a forward of their own
        self._seen: set[int] = set()
        for name, module in self._model.named_modules():
            self._note_module(name, module)
        self._sizes = list(map(len, self._sized))
        self._tensors = [v for v in self._values if isinstance(v, Tensor)]
        self._kinds = list(map(_kind, self._tensors))

    def changed(self) -> StructureChange | None:
        """The first change since `accept_current`, or None."""
        if self._is_as_it_was():
            return None
        replaced: dict[int, Any] = {}
        for i, (holder, key, value) in enumerate(zip(self._holders, self._keys, self._values, strict=True)):
            now = _get(holder, key)
            if now is not value and not _is_equal(now, value):
                replaced[i] = now
        if replaced:
            first = ".".join(filter(None, self._labels[min(replaced)]))
            return StructureChange(
                f"{first} was replaced by {_described(replaced[min(replaced)])}", self._swapped(replaced)
            )
        for tensor, kind in zip(self._tensors, self._kinds, strict=True):
            if _kind(tensor) != kind:
                name = next(
                    ".".join(filter(None, n)) for n, v in zip(self._labels, self._values, strict=True) if v is tensor
                )
                return StructureChange(f"{name} became {tensor.dtype} on {tensor.device}", None)
        if list(map(len, self._sized)) != self._sizes or any(self._empty) or self._has_new_forward():
            return StructureChange("a child, a parameter, a hook or a forward was added or taken away", None)
        self.accept_current()  # other objects, equal values
        return None

    def _is_as_it_was(self) -> bool:
        try:
            return (
                all(map(is_, map(getitem, self._holders, self._keys), self._values))
                and not any(self._empty)
                and list(map(len, self._sized)) == self._sizes
                and not self._has_new_forward()
                and list(map(_kind, self._tensors)) == self._kinds
            )
        except (KeyError, IndexError):
            return False

    def _has_new_forward(self) -> bool:
        return any(map(contains, self._dicts, repeat("forward")))

    def _swapped(self, replaced: Mapping[int, Any]) -> dict[str, Tensor] | None:
        """The new tensors by name if `replaced` (index -> new value) holds tensors only."""
        before = {i: v for i, v in enumerate(self._values) if isinstance(v, Tensor)}
        after = {**before, **replaced}
        for i, new in replaced.items():
            old = before.get(i)
            alike = old is not None and isinstance(new, Tensor) and type(new) is type(old) and _kind(new) == _kind(old)
            if not alike or self._holders[i] is not self._place_of(i) or not _same_shape(old, new):
                return None
        if _ties(before.values()) != _ties(after.values()):
            return None
        return {".".join(filter(None, self._labels[i])): new for i, new in replaced.items()}

    def _place_of(self, i: int) -> Any:
        """The dict of parameters or of buffers that entry `i` should be in; None if its module is gone."""
        try:
            module = self._model.get_submodule(self._labels[i][0])
        except AttributeError:
            return None
        key = self._keys[i]
        return module._parameters if key in module._parameters else module._buffers

    def _note_module(self, name: str, module: nn.Module) -> None:
        state = vars(module)
        for part in ("_modules", "_parameters", "_buffers"):
            self._note_entries(state[part], (name,), 0)
        for part in ("_forward_hooks", "_forward_pre_hooks"):
            self._note_entries(state[part], (name, "hook"), 0)
        self._note(state, "training", state["training"], (name, "training"))
        if "forward" in state:
            self._note(state, "forward", state["forward"], (name, "forward"))
        else:
            self._dicts.append(state)
        if not type(module).__module__.startswith("torch.nn."):
            for key, value in state.items():
                if key not in _OF_EVERY_MODULE and key not in ("forward", "training"):
                    self._note(state, key, value, (name, key))
                    self._look_into(value, (name, key), 1)

    def _look_into(self, value: Any, label: tuple[str, str], depth: int) -> None:
        if depth > _DEPTH or isinstance(value, (*_PLAIN, Tensor, nn.Module, type)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, (dict, list)):
            self._note_entries(value, label, depth)
        elif not callable(getattr(value, "__get__", None)) and isinstance(getattr(value, "__dict__", None), dict):
            self._note_entries(vars(value), label, depth, sized=False)

    def _note_entries(self, holder: Any, label: tuple[str, ...], depth: int, *, sized: bool = True) -> None:
        """Note every entry of a dict or list, and its length."""
        if sized:
            (self._sized if len(holder) else self._empty).append(holder)
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            self._note(holder, key, value, (label[0], label[1] if len(label) > 1 else str(key)))
            if depth:
                self._look_into(value, (label[0], label[1]), depth + 1)

    def _note(self, holder: Any, key: Any, value: Any, label: tuple[str, str]) -> None:
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(value)
        self._labels.append(label)


_kind = attrgetter("dtype", "device")


def _get(holder: Any, key: Any) -> Any:
    try:
        return holder[key]
    except (KeyError, IndexError):
        return None


def _is_equal(now: Any, value: Any) -> bool:
    """Whether both are equal plain values, or containers of equal or identical entries.

    Export replaces a module's lists and tuples by copies.
    """
    if type(now) is not type(value):
        return False
    if isinstance(value, dict):
        return now.keys() == value.keys() and all(_is_equal_item(now[key], value[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return len(now) == len(value) and all(map(_is_equal_item, now, value))
    return isinstance(value, _PLAIN) and bool(now == value)


def _is_equal_item(now: Any, value: Any) -> bool:
    return now is value or _is_equal(now, value)


def _same_shape(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and (a.shape == b.shape or a.numel() == 0) and (a.stride() == b.stride() or a.numel() == 0)


def _ties(tensors: Iterator[Tensor] | Any) -> list[int]:
    """For each tensor the index of its first occurrence."""
    first: dict[int, int] = {}
    return [first.setdefault(id(t), i) for i, t in enumerate(tensors)]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return "another tensor"
    return repr(value) if isinstance(value, _PLAIN) else f"another {type(value).__name__}"
