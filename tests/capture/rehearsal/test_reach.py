"""Everything that user code can reach is found, with a label, and no user code is called."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import enum
import functools
import random
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.rehearsal import reach as reach_module
from fusion_compile._capture.rehearsal.reach import Reach
from tests.capture.small_programs import Part, around

CONFIG = types.SimpleNamespace(kl=0.5, tables={"a": torch.zeros(1)})
QUEUE = [torch.zeros(1)]
UNNAMED = torch.zeros(1)
own_settings = types.ModuleType("own_settings")
own_settings.scale = torch.zeros(1)  # type: ignore[attr-defined]


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    inner: Any


class Counter:
    seen = torch.zeros(1)

    def __init__(self) -> None:
        self.inner = torch.zeros(1)

    def loss(self, model: nn.Module) -> Any:
        return QUEUE

    @property
    def hidden(self) -> Any:
        return CONFIG

    @functools.cached_property
    def later(self) -> Any:
        return own_settings.scale


class Hostile:
    """Everything that a careless reader would call raises."""

    def __init__(self, inner: Any) -> None:
        object.__setattr__(self, "inner", inner)

    def _raise(self, *args: Any) -> Any:
        raise AssertionError("user code was called")

    __getattr__ = __setattr__ = __len__ = __iter__ = __eq__ = __repr__ = __bool__ = _raise
    __hash__ = None  # type: ignore[assignment]
    size = property(_raise)
    __class__ = property(_raise)


class HostileList(list):
    __iter__ = __len__ = __getitem__ = Hostile._raise


def labels_of(found: Any) -> set[str]:
    return {label for label, _ in found.values()}


def tensors(**roots: Any) -> set[str]:
    return labels_of(Reach(roots).tensors)


def _uses_globals(model: Any) -> Any:
    def inner() -> Any:
        return [CONFIG.tables for _ in own_settings.scale]

    return inner


def _closes_over(value: Any) -> Any:
    return lambda model: [value for _ in model]


def _with_default(model: Any, memory: Any = QUEUE, *, more: Any = CONFIG) -> Any:
    return memory, more


def _generates(value: Any) -> Iterator[Any]:
    yield value


def _with_attribute(model: Any) -> Any: ...


_with_attribute.kept = torch.zeros(1)  # type: ignore[attr-defined]


@functools.lru_cache
def cached(size: int) -> Tensor:
    return torch.zeros(size)


def local(value: Any) -> threading.local:
    made = threading.local()
    made.value = value
    return made


T = torch.zeros(1)
WAYS: list[tuple[Any, str]] = [
    (T, "root"),
    ([T], "root[0]"),
    ({"a": [T]}, "root['a'][0]"),
    (collections.deque([T]), "root[0]"),
    (collections.OrderedDict(a=T), "root['a']"),
    ({Colour.RED: T}, "root[<Colour>]"),
    ((1, (T,)), "root[1][0]"),
    (Pair(1, T), "root.right"),
    (Slotted(T), "root.inner"),
    (types.SimpleNamespace(a=T), "root.a"),
    (Hostile(T), "root.inner"),
    (Hostile(HostileList([T])), "root.inner[0]"),
    (functools.partial(print, T), "root.args[0]"),
    (functools.partial(print, end=T), "root.keywords['end']"),
    ([T].append, "root.__self__[0]"),
    (_closes_over(T), "root<value>"),
    (_with_attribute, "root.kept"),
    (_uses_globals, "CONFIG.tables['a']"),
    (_uses_globals, "own_settings.scale"),
    (_with_default, "root.__defaults__[0][0]"),
    (_with_default, "root.__kwdefaults__['more'].tables['a']"),
    (Counter(), "root.inner"),
    (Counter(), "Counter.seen"),
    (Counter().loss, "root.__self__.inner"),
    (Counter(), "QUEUE[0]"),
    (Counter(), "CONFIG.tables['a']"),
    (Counter(), "own_settings.scale"),
    (_generates(T), "root:value"),
    (iter([T]), "root[0]"),
    (zip([T], [1], strict=True), "root[0][0]"),
    (local(T), "root.value"),
    (weakref.WeakValueDictionary(a=T), "root.data['a']"),
    (torch.no_grad()(_closes_over(T)), "root.__wrapped__<value>"),
    (around(Part(lambda part, x: x, table={5: T})), "root.1.table[5]"),
    (nn.BatchNorm1d(2), "root.running_mean"),
]


@pytest.mark.parametrize(("root", "label"), WAYS, ids=lambda v: v if type(v) is str else "")
def test_a_tensor_is_found(root: Any, label: str) -> None:
    assert label in tensors(root=root)


def test_each_tensor_is_found_once_and_named_by_the_shortest_way() -> None:
    assert tensors(root=[{"deep": T}, T]) == {"root[1]"}


def test_an_unnamed_global_is_not_reached() -> None:
    assert not any("UNNAMED" in label for label in tensors(loss_fn=_uses_globals))
    assert UNNAMED.numel() == 1


def test_what_a_cache_holds_is_reached() -> None:
    cached.cache_clear()
    cached(3)
    found = Reach({"loss_fn": cached})
    assert labels_of(found.caches) == {"loss_fn"} and labels_of(found.tensors) == {"loss_fn(…)"}


def test_the_value_of_a_context_variable_is_reached() -> None:
    variable: contextvars.ContextVar[Tensor] = contextvars.ContextVar("variable")
    variable.set(T)
    assert tensors(loss_fn=variable) == {"loss_fn.get()"}


def test_an_optimizers_state_is_labelled_by_parameter() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert "optimizer.state[model.weight]['exp_avg']" in tensors(model=model, optimizer=optimizer)


def test_generators_modules_arrays_and_iterators_are_listed() -> None:
    model = around(nn.Tanh())
    random_ones = [torch.Generator(), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
    found = Reach({"model": model, "random": random_ones, "array": np.zeros(3), "iterator": iter([1])})
    assert labels_of(found.generators) == {f"random[{i}]" for i in range(4)}
    assert labels_of(found.modules) == {"model", "model.0", "model.1", "model.2"}
    assert labels_of(found.arrays) == {"array"} and labels_of(found.iterators) == {"iterator"}


def test_the_hooks_of_a_module_are_slots() -> None:
    model = nn.Linear(2, 2)
    handle = model.register_forward_hook(lambda *_: None)
    assert f"model._forward_hooks[{handle.id}]" in {slot.label for slot, _ in Reach({"model": model}).slots()}


def test_slots_have_present_values() -> None:
    values = {slot.label: value for slot, value in Reach({"loss_fn": _uses_globals}).slots()}
    assert values["CONFIG.kl"] == 0.5 and values["CONFIG"] is CONFIG


def test_a_chain_of_thousands_is_walked() -> None:
    chain: list[Any] = [T]
    for _ in range(5000):
        chain = [chain]
    assert len(Reach({"root": chain}).tensors) == 1


def test_a_large_container_is_looked_into_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_module, "WIDE", 2)
    found = Reach({"data": [torch.zeros(1) for _ in range(5)], "pair": tuple(torch.zeros(1) for _ in range(3))})
    assert labels_of(found.tensors) == {"data[0]", "data[1]", "pair[0]", "pair[1]"}
    assert sorted(found.cut) == ["data", "pair"]


def test_the_walk_ends_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_module, "MOST", 3)
    found = Reach({"data": [[], [], [], []]})
    assert found.cut == ["data[2]"]


def test_what_comes_last_does_not_give_labels_to_what_comes_first() -> None:
    model = nn.Linear(2, 2)
    found = Reach({"model": model}, {"inputs": [model.weight, T]})
    assert labels_of(found.tensors) == {"model.weight", "model.bias", "inputs[1]"}
    assert found.label_of(model.weight, "") == "model.weight" and found.holds(T)


def test_tensors_that_are_keys_and_reached_later_have_a_label_each() -> None:
    keys = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    state = {key: {"step": torch.zeros(())} for key in keys}
    labels = [found.label for found in Reach({"state": state}).tensors.values()]
    assert len(set(labels)) == len(labels) == 4
