"""Contents are compared and put back in place, whatever a run did to them."""

from __future__ import annotations

import collections
import contextvars
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot
from fusion_compile._capture.rehearsal.contents import Contents, as_it_was, holds_fake
from fusion_compile._compat import fake_mode
from tests.capture.small_programs import Part

COUNT = 0


class Plain:
    shared = 1
    __slots__ = ("__dict__", "slot")

    def __init__(self, **attributes: Any) -> None:
        self.slot = 0
        self.__dict__.update(attributes)


def _delete(value: Any) -> None:
    del value.a


def _new_dictionary(value: Any) -> None:
    value.__dict__ = {"a": 2}


def _global(value: Any) -> None:
    global COUNT
    COUNT += 1


def _gradient(value: Any) -> None:
    value.a.weight.grad = torch.ones(1, 2)


def _require(value: Any) -> None:
    value.a.weight.requires_grad_(False)


def _data(value: Any) -> None:
    value.a.weight.data = torch.ones(1, 2)


def _graph(value: Any) -> None:
    value.b.add_(value.a.weight.sum())


def _tag(value: Any) -> None:
    value.a.weight.no_decay = True


def _hook(value: Any) -> None:
    value.a.weight.register_hook(lambda grad: grad * 2)


def _child(value: Any) -> None:
    value.a.child = nn.Tanh()


def _buffer(value: Any) -> None:
    value.a.register_buffer("late", torch.zeros(1), persistent=False)


def _class(value: Any) -> None:
    Plain.shared = 2


EDITS: list[tuple[Callable[[], Any], Callable[[Any], None], dict[str, str]]] = [
    (lambda: Plain(a=1), lambda v: setattr(v, "a", 2), {"root.a": "replaced"}),
    (lambda: Plain(a=1), lambda v: setattr(v, "b", 2), {"root.b": "appeared"}),
    (lambda: Plain(a=1), _delete, {"root.a": "vanished"}),
    (lambda: Plain(a=1), lambda v: setattr(v, "slot", 2), {"root.slot": "replaced"}),
    (lambda: Plain(a=1), _new_dictionary, {}),  # what is compared is the dictionary of before
    (lambda: Plain(a=[1]), lambda v: v.a.append(2), {"root.a": "grew"}),
    (lambda: Plain(a=[1]), lambda v: v.a.pop(), {"root.a": "shrank"}),
    (lambda: Plain(a=[[1], 2]), lambda v: v.a[0].__setitem__(0, 5), {"root.a[0][0]": "replaced"}),
    (lambda: Plain(a={1: 2}), lambda v: v.a.pop(1), {"root.a[1]": "vanished"}),
    (lambda: Plain(a={1, 2}), lambda v: v.a.add(3), {"root.a": "grew"}),
    (lambda: Plain(a=collections.deque([1, 2], maxlen=2)), lambda v: v.a.append(2), {"root.a[0]": "replaced"}),
    (lambda: Plain(a=np.zeros(2)), lambda v: v.a.__setitem__(0, 1), {"root.a": "same object mutated"}),
    (lambda: Plain(f=_global), lambda v: v.f(v), {"COUNT": "replaced"}),
    (lambda: Plain(), _class, {"Plain.shared": "replaced"}),
    (lambda: Plain(a=nn.Linear(2, 1)), _gradient, {"root.a.weight.grad": "replaced"}),
    (lambda: Plain(a=nn.Linear(2, 1)), _require, {"root.a.weight.requires_grad": "replaced"}),
    (lambda: Plain(a=nn.Linear(2, 1)), _data, {"root.a.weight.data": "replaced"}),
    (lambda: Plain(a=nn.Linear(2, 1)), _tag, {"root.a.weight.no_decay": "appeared"}),
    (lambda: Plain(a=nn.Linear(2, 1)), _hook, {"root.a.weight._backward_hooks": "replaced"}),
    (lambda: Plain(a=nn.Linear(2, 1)), _child, {"root.a.child": "appeared"}),
    (lambda: Plain(a=nn.Linear(2, 1)), lambda v: v.a.eval(), {"root.a.training": "replaced"}),
    (
        lambda: Plain(a=nn.Linear(2, 1)),
        _buffer,
        {"root.a.late": "appeared", "root.a._non_persistent_buffers_set": "grew"},
    ),
    (lambda: Plain(a=nn.Linear(2, 1), b=torch.zeros(1)), _graph, {"root.b.requires_grad": "replaced"}),
    (lambda: Plain(a=1, b=(1, "x"), c=float("nan")), lambda v: vars(v).update(b=(1, "x"), c=float("nan")), {}),
]


@pytest.mark.parametrize(("make", "edit", "expected"), EDITS)
def test_an_edit_is_seen_and_undone(make: Any, edit: Callable[[Any], None], expected: dict[str, str]) -> None:
    value = make()
    contents = Contents({"root": value})
    edit(value)
    seen = {c.label: c.kind.value.replace("mutated", "same object mutated") for c in contents.changes()}
    assert seen == expected
    contents.restore()
    assert contents.changes() == []
    again = Contents({"root": value}).items()
    assert [items for _, items in again] == [items for _, items in contents.items()]


def test_a_tensor_that_joined_a_graph_is_a_leaf_again() -> None:
    value = Plain(a=nn.Linear(2, 1), b=torch.zeros(1))
    contents = Contents({"root": value})
    _graph(value)
    contents.restore()
    assert value.b.grad_fn is None and not value.b.requires_grad and value.b.is_leaf  # type: ignore[attr-defined]


def test_a_removed_hook_is_not_called() -> None:
    layer = nn.Linear(2, 1)
    contents = Contents({"layer": layer})
    layer.weight.register_hook(lambda grad: grad * 100)
    contents.restore()
    layer(torch.ones(1, 2)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(1, 2))  # type: ignore[arg-type]


def test_a_replaced_instance_dictionary_is_put_back() -> None:
    value = Plain(a=1)
    attributes = vars(value)
    contents = Contents({"root": value})
    _new_dictionary(value)
    contents.restore()
    assert vars(value) is attributes and attributes == {"a": 1}


def test_containers_keep_their_identity() -> None:
    inner: list[int] = [1]
    value = Plain(a=inner)
    contents = Contents({"root": value})
    value.a = [2]  # type: ignore[attr-defined]
    inner.append(3)
    contents.restore()
    assert value.a is inner and inner == [1]  # type: ignore[attr-defined]


def test_changes_hold_slots_and_values() -> None:
    value = Plain(a=1, c=[1])
    contents = Contents({"root": value})
    value.b, value.a = 3, 2  # type: ignore[attr-defined]
    value.c.append(5)  # type: ignore[attr-defined]
    by_label = {change.label: change for change in contents.changes()}
    assert by_label["root.a"][1:4] == (Slot(vars(value), "a", "root.a"), 1, 2)
    assert by_label["root.b"].before is MISSING
    assert by_label["root.c"].slot == Slot(value.c, WHOLE, "root.c")  # type: ignore[attr-defined]
    assert by_label["root.c"].before == [1] and by_label["root.c"].after == [1, 5]


def test_kept_slots_stay() -> None:
    value = Plain(a=1, b=[1], c=1)
    contents = Contents({"root": value})
    vars(value).update(a=2, c=2)
    value.b.append(2)  # type: ignore[attr-defined]
    contents.restore(keep=[Slot(vars(value), "a", ""), Slot(value.b, WHOLE, "")])  # type: ignore[attr-defined]
    assert vars(value) == {"a": 2, "b": [1, 2], "c": 1}


def test_filled_caches_are_emptied_unless_kept() -> None:
    @functools.lru_cache
    def one(n: int) -> Tensor:
        return torch.zeros(n)

    @functools.lru_cache
    def two(n: int) -> Tensor:
        return torch.zeros(n)

    contents = Contents({"loss_fn": lambda: (one, two)})
    one(1), two(1)
    assert contents.filled_caches() == [one, two]
    contents.restore(keep_caches=[two])
    assert (one.cache_info().currsize, two.cache_info().currsize) == (0, 1)


def test_an_iterator_over_a_list_is_set_back() -> None:
    iterator = iter([1, 2, 3])
    next(iterator)
    contents = Contents({"loss_fn": lambda: next(iterator)})
    next(iterator)
    (change,) = contents.changes()
    assert (change.label, change.kind.value, change.slot) == ("loss_fn<iterator>", "moved", None)
    contents.restore()
    assert contents.not_put_back() == [] and list(iterator) == [2, 3]


def _counting() -> Any:
    n = 0
    while True:
        yield n
        n += 1


@pytest.mark.parametrize("iterator", [zip(_counting()), _counting()], ids=["zip", "generator"])
def test_an_iterator_that_cannot_be_set_back_is_named(iterator: Any) -> None:
    next(iterator)
    contents = Contents({"loss_fn": lambda: next(iterator)})
    assert contents.not_put_back() == []
    next(iterator)
    contents.restore()
    assert [label.removesuffix("[0]") for label in contents.not_put_back()] == ["loss_fn<iterator>"]


def test_a_context_variable_is_put_back() -> None:
    variable = contextvars.ContextVar("variable", default=1)
    variable.set(2)
    contents = Contents({"loss_fn": lambda: variable.get()})
    variable.set(3)
    assert [change.label for change in contents.changes()] == ["loss_fn<variable>.get()"]
    contents.restore()
    assert variable.get() == 2


def test_generators_are_put_back() -> None:
    generator = torch.Generator()
    contents = Contents({"generator": generator})
    first = torch.rand(2, generator=generator)
    assert contents.moved_generators() == ["generator"]
    contents.restore()
    assert torch.equal(torch.rand(2, generator=generator), first)


def test_a_cell_that_was_empty_is_empty_again() -> None:
    def loss() -> Any:
        return late

    contents = Contents({"loss_fn": loss})
    late = 1
    contents.restore()
    with pytest.raises(NameError):
        loss()


def test_tensors_of_a_trace_are_found_wherever_they_lie() -> None:
    part: Any = Part(lambda part, x: x, table=None, slots=Plain(a={}), real=torch.zeros(1))

    @functools.lru_cache
    def cached(n: int) -> tuple[Tensor, int]:
        return torch.zeros(n), n

    holder = types.SimpleNamespace(cached=cached)
    assert holds_fake({"model": part, "holder": holder}) == []
    with fake_mode():
        part.table, part.slots.slot, part.slots.a[3] = [torch.zeros(1)], torch.zeros(1), torch.zeros(1)
        cached(2)
    assert set(holds_fake({"model": part, "holder": holder})) == {
        *("model.table[0]", "model.slots.slot", "model.slots.a[3]", "holder.cached(…)[0]")
    }


def test_everything_is_put_back_after_an_error() -> None:
    held: dict[str, Any] = {"a": [1]}
    inner = held["a"]
    with pytest.raises(ZeroDivisionError), as_it_was({"held": held}):
        held["a"].append(2)
        held.update(a=None, b=1 // 0)
    assert held == {"a": [1]} and held["a"] is inner


OBJECT, TANH = Plain(a=1), nn.Tanh()
