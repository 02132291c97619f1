"""What a watch watches: the holders that can be reached from a capture's roots and from what it read.

Of modules, everything. Of containers, everything within a depth and a size. Of other objects, the attributes that code
which ran names; a trainer's history, its logger and its optimizer's state are not what a loss was captured from.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import enum
import functools
import os
import threading
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from fusion_compile._capture._compat import global_module_hooks
from fusion_compile._capture.holders import PLAIN, Holder, contents, slot_names
from fusion_compile._capture.reads import is_foreign
from fusion_compile._capture.slots import ABSENT, Slot, declaring, instance_dict

DEPTH = 6
"""Containers and objects in one another that are looked into."""
LONGEST = 1000
"""Entries of a container that are watched one by one; of a longer one only the length is."""
_ARRAY_BYTES = 8192

_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local)
"""Classes of the standard library that people keep their own values in."""

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_CHILDREN = ("_parameters", "_buffers", "_modules")
STANDARD = frozenset(vars(nn.Module()))
"""The attributes of every module."""


class Walk:
    """Everything found. Each list's order is that of finding.

    Attributes:
        often: What was read, and what people change between calls.
        seldom: Everything else on modules and classes, and tensors' hooks.
        sized: Containers compared by length, with their labels.
        arrays: Small numpy arrays compared by bytes, with their labels.
        called: Slots whose value a function gives: context variables, the environment.
        missing: Attributes that were looked for and not there.
        tensors: By id, every tensor that was found, with its label.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        self.often: list[Holder] = []
        self.seldom: list[Holder] = []
        self.sized: list[tuple[Any, str]] = []
        self.arrays: list[tuple[Any, str]] = []
        self.called: list[Slot] = []
        self.missing: list[Slot] = []
        self.tensors: dict[int, tuple[Tensor, str]] = {}
        self._names = names
        self._seen: set[int] = set()
        self._classes_seen: set[type] = set()
        self._picks: dict[int, tuple[Any, str, dict[Any, None]]] = {}
        self._labels: dict[int, str] = {}
        """By an instance dictionary's id, what its object is called from a root."""

    def roots(self, roots: Mapping[str, Any]) -> None:
        """Everything reachable from `roots` (label -> value); modules first, so that they get their own names."""
        for label, value in sorted(roots.items(), key=lambda item: not isinstance(item[1], nn.Module)):
            self._look_into(value, label, 0)
        for label, hooks in global_module_hooks().items():
            self._hooks(hooks, label)

    def slots(self, slots: Iterable[Slot]) -> None:
        """What was read, and what lies in it."""
        for slot in slots:
            value = slot.value()
            if isinstance(slot.holder, (contextvars.ContextVar, type(os.environ))):
                self.called.append(slot)
            elif value is ABSENT:
                if isinstance(slot.holder, dict):
                    known = self._labels.get(id(slot.holder))
                    self.missing.append(Slot(slot.holder, slot.key, f"{known}.{slot.key}" if known else slot.label))
            elif isinstance(slot.holder, (dict, type)):
                self._pick(slot.holder, slot.key, _holders_label(slot))
            elif not isinstance(slot.holder, (list, tuple, collections.deque)):  # these are watched as containers
                self._whole(slot.holder, slot.label.rpartition(".")[0], ".k")
            self._look_into(value, slot.label, 1)

    def finish(self) -> None:
        """Make holders of the single slots that were picked."""
        picked = [
            Holder(container, label.removesuffix("[]"), "[k]" if label.endswith("[]") else ".k", tuple(keys))
            for container, label, keys in self._picks.values()
        ]
        self.often[:0] = picked

    def _pick(self, container: Any, key: Any, label: str) -> None:
        """Watch one slot. `label`: what its holder is called, with ``[]`` for items; its name from a root is better."""
        if id(container) not in self._seen:  # else it is watched as a whole
            label = container.__qualname__ if isinstance(container, type) else self._labels.get(id(container), label)
            self._picks.setdefault(id(container), (container, label, {}))[2][key] = None

    def _whole(self, container: Any, label: str, style: str = "[k]", *, seldom: bool = False) -> bool:
        """Watch everything in `container`; False if it is watched already."""
        if id(container) in self._seen:
            return False
        self._seen.add(id(container))
        (self.seldom if seldom else self.often).append(Holder(container, label, style))
        return True

    def _look_into(self, value: Any, label: str, depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, label)
        elif depth > DEPTH or isinstance(value, (*PLAIN, type, types.ModuleType, enum.Enum)):
            return
        elif isinstance(value, nn.Module):
            self._module(value, label)
        elif isinstance(value, (dict, list, tuple, collections.deque, set, frozenset)):
            self._container(value, label, depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, label, depth)
        elif isinstance(value, types.MethodType):
            self._look_into(value.__func__, label, depth)
            self._look_into(value.__self__, f"{label}.__self__" if depth else label, depth)
        elif isinstance(value, functools.partial):
            if self._whole(value, label, ".k"):
                for name, part in contents(value).items():
                    self._look_into(part, f"{label}.{name}", depth)
        elif isinstance(value, np.ndarray):
            if id(value) not in self._seen and not value.dtype.hasobject:
                self._seen.add(id(value))
                if value.nbytes <= _ARRAY_BYTES:
                    self.arrays.append((value, label))
        elif not is_foreign(type(value)) or isinstance(value, _NAMESPACES):
            self._object(value, label, depth)

    def _tensor(self, tensor: Tensor, label: str) -> None:
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = (tensor, label)
            self._whole(tensor, f"{label}'s gradient hook", "", seldom=True)
            own = instance_dict(tensor)
            if own:
                self._container(own, label, 1, style=".k")

    def _container(self, value: Any, label: str, depth: int, style: str = "[k]") -> None:
        if len(value) > LONGEST:
            self.sized.append((value, label))
            return
        if isinstance(value, (tuple, frozenset)):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
        elif not self._whole(value, label, style):
            return
        entries = enumerate(value) if isinstance(value, (set, frozenset)) else contents(value).items()
        named = Holder(value, label, style)
        for key, inner in list(entries):
            if not isinstance(inner, PLAIN):
                self._look_into(inner, named.named(key), depth + 1)

    def _function(self, value: types.FunctionType, label: str, depth: int) -> None:
        if is_foreign(value) or not self._whole(value, label, ".k"):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self._whole(cell, name, "")
            self._look_into(Slot(cell, "cell_contents", name).value(), name, depth + 1)
        arguments = value.__code__.co_varnames[: value.__code__.co_argcount]
        defaults = value.__defaults__ or ()
        for name, default in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
            self._look_into(default, f"{label}'s default {name}", depth + 1)
        for name, default in (value.__kwdefaults__ or {}).items():
            self._look_into(default, f"{label}'s default {name}", depth + 1)
        if value.__kwdefaults__:
            self._whole(value.__kwdefaults__, f"{label}'s defaults")
        self._container(vars(value), label, depth, style=".k")

    def _object(self, value: Any, label: str, depth: int) -> None:
        if id(value) in self._seen:
            return
        self._whole(value, label, ".k")
        own = instance_dict(value)
        if own is not None:
            self._labels[id(own)] = label
        found = {} if own is None else {k: v for k, v in own.items() if self._names is None or k in self._names}
        for key in found:
            self._pick(own, key, label)
        found |= {k: v for k, v in contents(value).items() if k in slot_names(value)}
        for key, inner in found.items():
            self._look_into(inner, f"{label}.{key}", depth + 1)
        if isinstance(value, (dict, list)):
            self._container(value, label, depth)
        self._classes(type(value))

    def _module(self, root: nn.Module, label: str) -> None:
        found = list(root.named_modules())
        new = [
            (".".join(filter(None, (label, name))), module) for name, module in found if id(module) not in self._seen
        ]
        for name, module in new:
            self._whole(module, name, ".k", seldom=True)
            self._labels[id(vars(module))] = name
        for name, module in new:
            self._one_module(name, module)

    def _one_module(self, name: str, module: nn.Module) -> None:
        state = vars(module)
        for part in _CHILDREN:
            self._whole(state[part], name, ".k", seldom=not state[part])
        for part in ("_parameters", "_buffers"):
            for key, tensor in state[part].items():
                if tensor is not None:
                    self._tensor(tensor, ".".join(filter(None, (name, key))))
        for part, what in _HOOKS.items():
            if part in state:
                self._hooks(state[part], f"{name}'s {what}" if name else f"the model's {what}")
        own = [key for key in state if key not in STANDARD]
        if self._names is None:
            often = [*own, *(["training"] if "training" in state else [])]
        elif type(module).__module__.startswith("torch.nn."):
            often = []  # their code is known to read by plain names: `slots` has them
        else:
            often = [key for key in own if key in self._names]
        for key in often:
            self._pick(state, key, name)
        for key in own:
            if not isinstance(state[key], PLAIN):
                self._look_into(state[key], ".".join(filter(None, (name, key))), 1)
        self.sized.append((state, name))
        self.seldom.append(Holder(state, name, ".k"))
        self._classes(type(module))

    def _hooks(self, hooks: dict[Any, Any], label: str) -> None:
        if self._whole(hooks, label, "", seldom=not hooks):
            for hook in list(hooks.values()):
                self._look_into(hook, label, 1)

    def _classes(self, kind: type) -> None:
        owner = declaring(kind, "forward")
        if owner is not None:
            self._pick(owner, "forward", "")
        for each in kind.__mro__:
            if each is not object and each not in self._classes_seen:
                self._classes_seen.add(each)
                self.seldom.append(Holder(each, each.__qualname__, ".k"))


def _holders_label(slot: Slot) -> str:
    """What the holder is called, with ``[]`` where the slot is an item; "" for a global."""
    if slot.label.endswith(f"[{slot.key!r}]"):
        return slot.label.removesuffix(f"[{slot.key!r}]") + "[]"
    return slot.label.removesuffix(str(slot.key)).removesuffix(".")
