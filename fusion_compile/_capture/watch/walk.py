"""What a watch watches: the holders that can be reached from a capture's roots and from what it read.

This is the walk of what may have decided a capture, in the order in which it is worth a look; what must be put back
after a run is more (`rehearsal/reach.py`). Of modules, everything. Of containers, everything within a depth and a size.
Of other objects, the attributes that code which ran names; a trainer's history, its logger and its optimizer's state
are not what a loss was captured from.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import enum
import functools
import inspect
import os
import threading
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from fusion_compile._capture.python_state._compat import global_module_hooks
from fusion_compile._capture.python_state.alike import PLAIN
from fusion_compile._capture.python_state.attributes import declaring, instance_dict, slot_descriptors
from fusion_compile._capture.python_state.bytecode import optional_names
from fusion_compile._capture.python_state.callables import defaults_of, free_variables, parts_of
from fusion_compile._capture.python_state.holders import Style, name_of
from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot, read
from fusion_compile._capture.python_state.whose_code import is_foreign
from fusion_compile._capture.watch.scope import STEP, Scope
from fusion_compile._capture.watch.watched_holder import WatchedHolder

DEPTH = 6
"""Containers and objects in one another that are looked into."""
LONGEST = 1000
"""Entries of a container that are watched one by one; of a longer one only the length is."""
_ARRAY_BYTES = 8192

_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local)
"""Classes of the standard library that people keep their own values in."""

_FORWARD_HOOKS = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}
_BACKWARD_HOOKS = {"_backward_hooks": "backward hook", "_backward_pre_hooks": "backward pre-hook"}
_CHILDREN = ("_parameters", "_buffers", "_modules")
STANDARD = frozenset(vars(nn.Module()))
"""The attributes of every module."""


class Walk:
    """Everything found. Each list's order is that of finding.

    Attributes:
        often: What was read, and what people change between calls, outside of modules.
        modules: The same of modules: children, parameters, buffers, hooks, attributes that were read.
        seldom: Everything else on modules and classes, and tensors' hooks.
        sized: Containers compared by length, with their labels.
        arrays: Small numpy arrays compared by bytes, with their labels.
        called: Slots whose value a function gives: context variables, the environment.
        missing: Attributes that were looked for and not there.
        tensors: By id, every tensor that was found, with its label.
        weights: Ids of the dictionaries of modules' parameters and buffers.
    """

    def __init__(self, names: Collection[str] | None, scope: Scope = STEP) -> None:
        self.often: list[WatchedHolder] = []
        self.modules: list[WatchedHolder] = []
        self.seldom: list[WatchedHolder] = []
        self.sized: list[tuple[Any, str]] = []
        self.arrays: list[tuple[Any, str]] = []
        self.called: list[Slot] = []
        self.missing: list[Slot] = []
        self.tensors: dict[int, tuple[Tensor, str]] = {}
        self.weights: set[int] = set()
        self._names = names
        self._scope = scope
        self._seen: set[int] = set()
        self._classes_seen: set[type] = set()
        self._picks: dict[int, tuple[Any, str, dict[Any, None]]] = {}
        self._rare_picks: dict[int, tuple[Any, str, dict[Any, None]]] = {}
        self._rarely = False
        self._modules: dict[int, nn.Module] = {}
        """By the instance dictionary's id."""
        self._read: set[tuple[type, Any]] = set()
        self._labels: dict[int, str] = {}
        """By an instance dictionary's id, what its object is called from a root."""

    def roots(self, roots: Mapping[str, Any]) -> None:
        """Everything reachable from `roots` (label -> value); modules first, so that they get their own names."""
        for label, value in sorted(roots.items(), key=lambda item: not isinstance(item[1], nn.Module)):
            self._look_into(value, label, 0)
        for label, hooks in global_module_hooks().items():
            if self._scope.training or not label.startswith("backward"):
                self._hooks(hooks, label)

    def slots(self, slots: Iterable[Slot]) -> None:
        """What was read, and what lies in it."""
        for slot in slots:
            if slot.key is WHOLE:
                self._all(slot)
                continue
            value = read(slot)
            known = self._labels.get(id(slot.holder))
            label = slot.label if known is None else ".".join(filter(None, (known, str(slot.key))))
            if id(slot.holder) in self._modules:
                self._read.add((type(self._modules[id(slot.holder)]), slot.key))
            if isinstance(slot.holder, (contextvars.ContextVar, type(os.environ))):
                self.called.append(slot)
            elif value is MISSING:
                if (
                    isinstance(slot.holder, dict) and id(slot.holder) not in self._modules
                ):  # a module's attributes are counted
                    self.missing.append(Slot(slot.holder, slot.key, label))
            elif isinstance(slot.holder, (dict, type)):
                self._pick(slot.holder, slot.key, _holders_label(slot))
            elif isinstance(slot.holder, types.CellType):
                self._whole(slot.holder, label, "")
            elif not isinstance(slot.holder, (list, tuple, collections.deque)):  # these are watched as containers
                self._whole(slot.holder, slot.label.rpartition(".")[0], ".k")
            self._look_into(value, label, 1)

    def _all(self, slot: Slot) -> None:
        """Watch all attributes of an object: code computes their names."""
        module = self._modules.get(id(slot.holder))
        if module is None:
            self._container(slot.holder, self._labels.get(id(slot.holder), slot.label), 1, style=".k")
        else:
            self._read.update((type(module), key) for key in slot.holder if key not in STANDARD)

    def finish(self) -> None:
        """Look into the modules' attributes: those that were read on any module of the class, then the others."""
        attributes = [
            (module, key, value, self._names is None or (type(module), key) in self._read)
            for module in list(self._modules.values())
            for key, value in vars(module).items()
            if key not in STANDARD or key == "training"
        ]
        for self._rarely in (False, True):
            for module, key, value, was_read in attributes:
                label = ".".join(filter(None, (self._labels[id(vars(module))], key)))
                if was_read and not self._rarely:
                    self._pick(vars(module), key, label.removesuffix(key).removesuffix("."))
                if was_read is not self._rarely:
                    self._look_into(value, label, 1)
        for rarely, picks in ((False, self._picks), (True, self._rare_picks)):
            picked = [
                WatchedHolder(container, label.removesuffix("[]"), "[k]" if label.endswith("[]") else ".k", tuple(keys))
                for container, label, keys in picks.values()
            ]
            for holder in reversed(picked):
                of_module = id(holder.value) in self._modules
                (self.seldom if rarely else self.modules if of_module else self.often).insert(0, holder)

    def _pick(self, container: Any, key: Any, label: str) -> None:
        """Watch one slot. `label`: what its holder is called, with ``[]`` for items; its name from a root is better."""
        if id(container) not in self._seen:  # else it is watched as a whole
            label = container.__qualname__ if isinstance(container, type) else self._labels.get(id(container), label)
            picks = self._rare_picks if self._rarely else self._picks
            picks.setdefault(id(container), (container, label, {}))[2][key] = None

    def _whole(
        self, container: Any, label: str, style: Style = "[k]", *, seldom: bool = False, of_module: bool = False
    ) -> bool:
        """Watch everything in `container`; False if it is watched already."""
        if id(container) in self._seen:
            return False
        self._seen.add(id(container))
        where = self.seldom if seldom or self._rarely else self.modules if of_module else self.often
        where.append(WatchedHolder(container, label, style))
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
        elif isinstance(value, (types.MethodType, functools.partial)):
            if isinstance(value, functools.partial) and not self._whole(value, label, ".k"):
                return
            for name, part in parts_of(value, label):
                self._look_into(part, name if depth else name.removesuffix(".__self__"), depth)
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
            if not self._scope.training:
                return
            self._whole(tensor, f"{label}'s gradient hook", "", seldom=True)
            own = instance_dict(tensor)
            if own:
                self._container(own, label, 1, style=".k")
            elif own is not None:
                self._whole(own, label, ".k", seldom=True)

    def _container(self, value: Any, label: str, depth: int, style: Style = "[k]") -> None:
        if len(value) > LONGEST:
            self.sized.append((value, label))
            return
        if isinstance(value, (tuple, frozenset)):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
        elif not self._whole(value, label, style):
            return
        holder = WatchedHolder(value, label, style)
        is_set = isinstance(value, (set, frozenset))
        for i, (key, inner) in enumerate(holder.items()):
            if not isinstance(inner, PLAIN):
                self._look_into(inner, holder.label_of(i if is_set else key), depth + 1)

    def _function(self, value: types.FunctionType, label: str, depth: int) -> None:
        if is_foreign(value) or not self._whole(value, label, ".k"):
            return
        for name, cell in free_variables(value):
            self._whole(cell, name, "")
            self._look_into(read(Slot(cell, None, name)), name, depth + 1)
        for name, default in defaults_of(value):
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
        declared = WatchedHolder(value, label, ".k", tuple(slot_descriptors(type(value))))
        for key, inner in (*found.items(), *((name_of(key), inner) for key, inner in declared.items())):
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
            self._modules[id(vars(module))] = module
        for name, module in new:
            self._one_module(name, module)

    def _one_module(self, name: str, module: nn.Module) -> None:
        state = vars(module)
        turns = self._scope.turns
        for part in _CHILDREN:
            self._whole(state[part], name, ".k", seldom=turns and not state[part], of_module=True)
        for part in ("_parameters", "_buffers"):
            self.weights.add(id(state[part]))
            for key, tensor in state[part].items():
                if tensor is not None:
                    self._tensor(tensor, ".".join(filter(None, (name, key))))
        for part, what in (_FORWARD_HOOKS | (_BACKWARD_HOOKS if self._scope.training else {})).items():
            if part in state:
                self._hooks(state[part], f"{name}'s {what}" if name else f"the model's {what}")
        if self._scope.new_attributes:
            self.sized.append((state, name))
            self.seldom.append(WatchedHolder(state, name, ".k"))
        else:
            self.seldom.append(WatchedHolder(state, name, ".k", (*_CHILDREN, *_FORWARD_HOOKS)))
            looked_for = {"forward"} | {
                key for key in _optional_of(cast(Any, type(module))) if declaring(type(module), key) is None
            }
            missing = sorted(looked_for - state.keys())
            self.missing += [Slot(state, key, ".".join(filter(None, (name, key)))) for key in missing]
        self._classes(type(module))

    def _hooks(self, hooks: dict[Any, Any], label: str) -> None:
        if self._whole(hooks, label, "", seldom=self._scope.turns and not hooks, of_module=not self._scope.turns):
            for hook in list(hooks.values()):
                self._look_into(hook, label, 1)

    def _classes(self, kind: type) -> None:
        owner = declaring(kind, "forward")
        if owner is not None:
            self._pick(owner, "forward", "")
        for each in kind.__mro__:
            if each is not object and each not in self._classes_seen:
                self._classes_seen.add(each)
                self.seldom.append(WatchedHolder(each, each.__qualname__, ".k"))


@functools.lru_cache(maxsize=4096)
def _optional_of(kind: Any) -> frozenset[str]:
    """Attributes that the methods of a module's class do without where they are missing."""
    own = [each for each in kind.__mro__ if each.__module__.partition(".")[0] not in ("torch", "builtins")]
    methods = (
        inspect.unwrap(entry) for each in own for entry in list(vars(each).values()) if inspect.isfunction(entry)
    )
    return frozenset[str]().union(
        *(optional_names(method.__code__) for method in methods if inspect.isfunction(method))
    )


def _holders_label(slot: Slot) -> str:
    """What the holder is called, with ``[]`` where the slot is an item; "" for a global."""
    if slot.label.endswith(f"[{slot.key!r}]"):
        return slot.label.removesuffix(f"[{slot.key!r}]") + "[]"
    return slot.label.removesuffix(str(slot.key)).removesuffix(".")
