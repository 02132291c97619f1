"""Everything that user code can reach from a model and a loss: holders of values, tensors, modules, generators.

This is the walk of what must be put back, which is all there is. What a watch compares is less: `watch/walk.py`.
The walk is breadth first and calls no user code: it reads instance dictionaries, slots, closures and containers by the
methods of the built-in types, never properties, ``__getattr__``, ``__len__`` or ``__iter__``.

What is not seen: of a container, items beyond the first `WIDE` are remembered but not looked into; the walk ends after
`MOST` objects (`Reach.cut` says where). Objects of the standard library and of `FOREIGN_PACKAGES` are opaque,
apart from containers, namespaces, partials and caches. Globals are followed from functions of the user's and of model
libraries, by the names in their bytecode: ``globals()["x"]`` and ``getattr(module, name)`` are not. What lies in C++
(scripted modules, the autograd graph) and in files is not.
"""

from __future__ import annotations

import builtins
import collections
import contextvars
import functools
import gc
import random
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state._compat import TENSOR_HOOKS, without_torch_function
from fusion_compile._capture.python_state.attributes import instance_dict, slot_descriptors
from fusion_compile._capture.python_state.bytecode import names_of
from fusion_compile._capture.python_state.callables import LRU_CACHE, free_variables, parts_of
from fusion_compile._capture.python_state.holders import Holder
from fusion_compile._capture.python_state.slots import MISSING, Slot
from fusion_compile._capture.python_state.whose_code import follows_globals, is_foreign, is_foreign_package

WIDE = 2048
"""Items of one container that are looked into."""
MOST = 200_000
"""Objects that are looked at in all."""

_LEAVES = {
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, types.CodeType, types.FrameType, types.TracebackType),
    *(types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
}
_WRAPPERS = {
    *(types.MethodType, types.BuiltinMethodType, functools.partial, LRU_CACHE, staticmethod, classmethod, property),
    functools.cached_property,
}
_OPENED = {"collections", "argparse", "weakref"}
"""Modules of the standard library whose objects are a program's own."""
_OPENED_TYPES = (types.SimpleNamespace, threading.local, functools.partialmethod)
_OPENED_TORCH = ("torch.nn", "torch.optim", "torch.utils.data", "torch.amp", "torch.distributions", "torch.ao")
_PARTS = ("_modules", "_parameters", "_buffers")
RANDOM_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Found(NamedTuple):
    """An object with the label of the first way to it."""

    label: str
    value: Any


class Reach:
    """What can be reached from `roots`, then from `last`, each object once.

    Attributes:
        holders: everything with slots, as `Holder`.
        tensors, modules, generators, caches, iterators, arrays: by identity, with labels. `generators` draw random
            numbers; `caches` are those of ``functools.lru_cache``; `iterators` are built-in ones and Python generators.
        instances: objects with an instance dictionary.
        cut: labels of containers that were not looked into to their ends, or of the object at which the walk ended.
    """

    def __init__(
        self, roots: Mapping[str, Any], last: Mapping[str, Any] | None = None, *, with_globals: bool = True
    ) -> None:
        self.holders: list[Holder] = []
        self.tensors: dict[int, Found] = {}
        self.modules: dict[int, Found] = {}
        self.generators: dict[int, Found] = {}
        self.caches: dict[int, Found] = {}
        self.iterators: dict[int, Found] = {}
        self.arrays: dict[int, Found] = {}
        self.instances: list[tuple[Any, dict[str, Any]]] = []
        self.cut: list[str] = []
        self._with_globals = with_globals
        self._seen: dict[int, Any] = {}  # the values keep their ids from being used again
        self._named: set[tuple[int, str]] = set()
        self._todo: collections.deque[tuple[str, Any]] = collections.deque()
        with without_torch_function():
            for start in (roots, last or {}):
                self._push(start.items())
                self._walk()

    def slot_label(self, holder: Holder, key: Any) -> str:
        """The label of a slot; a tensor that is a dictionary's key (an optimizer's state) goes by its own label."""
        if holder.is_dict and id(key) in self.tensors:
            return f"{holder.label}[{self.tensors[id(key)].label}]"
        if holder.is_dict and isinstance(key, Tensor):  # not reached yet: no two have one label
            at = next(i for i, each in enumerate(dict.keys(holder.value)) if each is key)
            return f"{holder.label}[<{type(key).__name__} {at}>]"
        return holder.label_of(key)

    def slots(self) -> Iterator[tuple[Slot, Any]]:
        """Every slot with its present value; a set is one slot for each element."""
        for holder in self.holders:
            for key, value in holder.items():
                yield Slot(holder.value, key, self.slot_label(holder, key)), value

    def holds(self, value: Any) -> bool:
        """Whether the walk met the object `value`."""
        return id(value) in self._seen

    def label_of(self, value: Any, default: str) -> str:
        """The label of a tensor, module or generator that was reached, else `default`."""
        for found in (self.tensors, self.modules, self.generators):
            if id(value) in found:
                return found[id(value)].label
        return default

    def _walk(self) -> None:
        while self._todo:
            label, value = self._todo.popleft()
            if type(value) in _LEAVES or id(value) in self._seen:
                continue
            if len(self._seen) >= MOST:
                self.cut.append(label)
                self._todo.clear()
                return
            self._seen[id(value)] = value
            self._visit(value, label)

    def _visit(self, value: Any, label: str) -> None:
        kind = type(value)
        bases = kind.__mro__
        found = Found(label, value)
        if Tensor in bases:
            self._visit_tensor(value, label)
        elif type in bases:
            self._visit_class(value)
        elif kind is types.FunctionType:
            self._visit_function(value, label)
        elif kind in _WRAPPERS:
            self._push(parts_of(value, label))
            if kind is LRU_CACHE:
                self._visit_cache(value, label)
        elif any(base in bases for base in RANDOM_GENERATORS):
            self.generators[id(value)] = found
        elif kind is np.ndarray:
            self.arrays[id(value)] = found
        elif kind is types.CellType:
            self._hold(Holder(value, label))
        elif kind is contextvars.ContextVar:
            self._hold(Holder(value, f"{label}.get()"))
        elif weakref.ReferenceType in bases:
            self._push([(label, value())])
        elif kind is types.GeneratorType:
            self.iterators[id(value)] = found
            if value.gi_frame is not None:
                self._push((f"{label}:{name}", local) for name, local in value.gi_frame.f_locals.items())
        elif "__next__" in vars(kind) and not _is_from_python(kind):
            self.iterators[id(value)] = found
            self._push((label, inner) for inner in gc.get_referents(value))
        elif not issubclass(kind, (Enum, types.ModuleType)):
            self._visit_container(value, bases, label)
            self._visit_instance(value, label)

    def _visit_container(self, value: Any, bases: tuple[type, ...], label: str) -> None:
        if dict in bases:
            self._hold(Holder(value, label))
            keys = enumerate(list(dict.keys(value))[:WIDE])
            self._push((f"key {i} of {label}" if i else f"a key of {label}", key) for i, key in keys)
        elif list in bases or collections.deque in bases or set in bases:
            self._hold(Holder(value, label))
        elif tuple in bases or frozenset in bases:
            own: Any = tuple if tuple in bases else frozenset
            fields = vars(type(value)).get("_fields", ())
            names = [f".{name}" for name in fields] if type(fields) is tuple else []
            for i, inner in enumerate(own.__iter__(value)):
                if i == WIDE:
                    self.cut.append(label)
                    break
                self._todo.append((f"{label}{names[i] if i < len(names) else f'[{i}]'}", inner))

    def _visit_instance(self, value: Any, label: str) -> None:
        """The attributes of an object, of its class and of its slots, unless the type is opaque."""
        kind = type(value)
        is_module = nn.Module in kind.__mro__
        if is_module:
            self.modules[id(value)] = Found(label, value)
        elif not _is_opened(kind):
            return
        attributes = instance_dict(value)
        if attributes is not None:
            self.instances.append((value, attributes))
            self._seen[id(attributes)] = attributes
            for part in _PARTS if is_module else ():
                inner = attributes.get(part)
                if inner is not None and dict in type(inner).__mro__ and id(inner) not in self._seen:
                    self._seen[id(inner)] = inner
                    self._hold(Holder(inner, label, ".k"))
            self._hold(Holder(attributes, label, ".k"))
        descriptors = tuple(slot_descriptors(kind))
        if descriptors:
            self._hold(Holder(value, label, ".k", descriptors))
        for base in kind.__mro__:
            self._todo.append((base.__name__, base))

    def _visit_tensor(self, tensor: Tensor, label: str) -> None:
        self.tensors[id(tensor)] = Found(label, tensor)
        keys = TENSOR_HOOKS if tensor.is_leaf else TENSOR_HOOKS[:1]
        self._hold(Holder(tensor, label, ".k", ("grad", *keys) if tensor.is_leaf else keys))
        attributes = instance_dict(tensor)
        if attributes is not None:  # tags on parameters: p.no_decay = True
            self._seen[id(attributes)] = attributes
            self._hold(Holder(attributes, label, ".k"))

    def _visit_class(self, kind: type) -> None:
        if not self._with_globals or not _is_from_python(kind) or issubclass(kind, Enum) or not _is_opened(kind):
            return
        if is_foreign_package(kind.__module__):
            return
        names = tuple(name for name in vars(kind) if not (name.startswith("__") and name.endswith("__")))
        names += tuple(
            name
            for name, value in vars(kind).items()
            if name.startswith("__") and name.endswith("__") and type(value) is types.FunctionType
        )
        self._hold(Holder(kind, kind.__name__, ".k", names))

    def _visit_cache(self, cache: Any, label: str) -> None:
        self.caches[id(cache)] = Found(label, cache)
        held = gc.get_referents(cache)
        self._push((f"{label}(…)", inner) for inner in held if type(inner) is not dict)
        self._push((f"{label}(…)", inner) for results in held if type(results) is dict for inner in results.values())

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        self._push((f"{label}<{name}>", cell) for name, cell in free_variables(function))
        self._hold(Holder(function, label, ".k", ("__defaults__", "__kwdefaults__")))
        attributes = vars(function)
        self._seen[id(attributes)] = attributes
        if str(function.__globals__.get("__name__")).partition(".")[0] == "torch":  # torch tags its own functions
            self._push((f"{label}.{name}", value) for name, value in attributes.items())
        else:
            self._hold(Holder(attributes, label, ".k"))
        if self._with_globals and follows_globals(function):
            names = names_of(function.__code__)
            self._hold_names(function.__globals__, "", names.of_globals)
            for name in names.of_globals:
                module = function.__globals__.get(name)
                if isinstance(module, types.ModuleType) and not is_foreign(module):
                    self._hold_names(vars(module), name, names.others & vars(module).keys())
            for name in names.imported:
                module = sys.modules.get(name)
                if module is not None and not is_foreign(module):
                    self._hold_names(vars(module), name, names.others & vars(module).keys())

    def _hold_names(self, scope: dict[str, Any], label: str, names: Iterable[str]) -> None:
        """Globals by name, each once; a name that does not exist yet counts, as a run may make it."""
        own = (name for name in names if name in scope or not hasattr(builtins, name))
        new = tuple(sorted(name for name in own if (id(scope), name) not in self._named))
        self._named.update((id(scope), name) for name in new)
        if new:
            self._hold(Holder(scope, label, ".k", new))

    def _hold(self, holder: Holder) -> None:
        """Note `holder` and go on to its values."""
        self.holders.append(holder)
        for i, (key, value) in enumerate(holder.items()):
            if i == WIDE and holder.keys is None and holder.style == "[k]":
                self.cut.append(holder.label)
                break
            if type(value) not in _LEAVES and value is not MISSING and id(value) not in self._seen:
                self._todo.append((self.slot_label(holder, key), value))

    def _push(self, labelled: Iterable[tuple[str, Any]]) -> None:
        self._todo.extend(labelled)


def _is_from_python(kind: type) -> bool:
    """Whether `kind` was made by a class statement: such types live on the heap and can be written."""
    return bool(kind.__flags__ & (1 << 9)) and "__module__" in vars(kind)


def _is_opened(kind: type) -> bool:
    """Whether the attributes of an object of type `kind` may be a training program's state."""
    module = kind.__module__
    if isinstance(module, str) and module.partition(".")[0] == "torch":
        return module.startswith(_OPENED_TORCH)
    return not is_foreign_package(module) or module in _OPENED or issubclass(kind, _OPENED_TYPES)
