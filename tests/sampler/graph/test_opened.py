"""Objects are taken apart and put together again, with other tensors in the same places."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.opened import (
    Before,
    Output,
    closed,
    holds_objects,
    identity_of,
    opened,
    take_out,
    unknown_leaves,
)
from fusion_compile.passes._compat import tree_flatten, tree_leaves, tree_map

A, B = torch.zeros(2), torch.ones(3)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: Tensor
    rest: Any


class Derived(dict[str, Any]):
    pass


class Ordered(OrderedDict[str, Any]):
    """As transformers' ModelOutput: writing an item sets an attribute."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Listed(list[Any]):
    pass


class Cache:
    def __init__(self) -> None:
        self.layers = [types.SimpleNamespace(key=A, value=B)]
        self.seen = 3


class Color(enum.Enum):
    RED = 1


Old = namedtuple("Old", ["a", "b"])
OBJECTS: list[Any] = [
    Frozen(A, {"b": [B, None]}),
    Derived(a=A, b=B),
    Ordered(a=A),
    Listed([A, 2]),
    Cache(),
    UserDict({"a": A}),
    types.SimpleNamespace(a=A, inner=Frozen(B, 1)),
]


@pytest.mark.parametrize("value", OBJECTS, ids=[type(value).__name__ for value in OBJECTS])
def test_an_object_comes_back_with_other_tensors(value: Any) -> None:
    assert holds_objects([value])
    apart = opened({"x": [value], "plain": (1, A)})
    tensors = [leaf for leaf in tree_leaves(apart) if isinstance(leaf, Tensor)]
    again = closed(tree_map(lambda leaf: leaf + 1 if isinstance(leaf, Tensor) else leaf, apart))
    (made,) = again["x"]
    assert type(made) is type(value) and made is not value
    assert again["plain"][0] == 1 and torch.equal(again["plain"][1], A + 1)
    assert opened(opened(value)) == opened(value) or tensors  # tensors have no equality of their own
    before, now = tree_flatten(opened(value)), tree_flatten(opened(made))
    assert before[1] == now[1]
    for one, other in zip(before[0], now[0], strict=True):
        assert torch.equal(one + 1, other) if isinstance(one, Tensor) else one == other


def test_what_holds_no_objects_is_returned_itself() -> None:
    value = {"a": [A, (1, None, "x")], "b": Old(A, B), "c": Color.RED, "d": np.zeros(2)}
    assert not holds_objects(value) and opened(value) is value and closed(value) is value


def test_items_are_written_past_the_class() -> None:
    (again,) = closed(opened([Ordered(a=A)]))
    assert list(again) == ["a"] and again["a"] is A and vars(again) == {"a": A}


def test_an_object_that_holds_itself_is_left_a_leaf() -> None:
    loop = types.SimpleNamespace(a=A)
    loop.me = loop
    assert list(unknown_leaves(opened(loop))) == [loop]


def test_what_is_told_apart_by_value_and_what_by_identity() -> None:
    assert identity_of(np.arange(3)) == identity_of(np.arange(3)) != identity_of(np.arange(1, 4))
    assert identity_of(slice(1, 2)) == (1, 2, None) and identity_of({1}) == frozenset({1})
    assert identity_of(Color.RED) is Color.RED and identity_of(2.0) == 2.0
    assert identity_of(len) == id(len)
    known = [A, 1, "x", len, functools.partial(len), Color.RED, np.float32(1), slice(1), {1}, range(2)]
    assert [*unknown_leaves(known)] == []
    strange = [nn.Linear(1, 1), torch.Generator(), iter(())]
    assert [*unknown_leaves(strange)] == strange


def test_outputs_have_constants_and_objects() -> None:
    tensors, output = Output.of((A, None, {"cache": Frozen(B, 2)}, 0.5))
    assert len(tensors) == output.n_tensors == 2 and output.unknown is None
    first, nothing, held, half = output.made_of([A + 1, B + 1])
    assert torch.equal(first, A + 1) and nothing is None and half == 0.5
    assert isinstance(held["cache"], Frozen) and torch.equal(held["cache"].a, B + 1) and held["cache"].rest == 2
    assert Output.of([iter(())])[1].unknown is type(iter(()))


def test_what_is_written_into_arguments_is_seen() -> None:
    arguments: dict[str, Any] = {"kept": {"scale": 1.0}, "cache": Cache(), "states": [A]}
    before = Before(arguments)
    assert before.written(arguments) is None and before.taken_out(arguments) == {}
    arguments["cache"].layers[0].key = A.clone()
    assert before.written(arguments) == "cache"
    arguments["kept"]["scale"] = 2.0
    assert before.written(arguments) == "kept"
    arguments["kept"]["scale"] = 1.0
    arguments["cache"].layers[0].key = A
    assert before.written(arguments) is None
    arguments["states"].append(B)
    assert before.written(arguments) == "states"


def test_what_is_taken_out_of_arguments_is_taken_out_of_the_callers() -> None:
    arguments: dict[str, Any] = {"states": [A, B, A], "options": {"a": A, "b": 1}, "kept": [A]}
    before = Before(arguments)
    arguments["states"].pop(1)
    arguments["options"].pop("a")
    assert before.written(arguments) is None
    taken = before.taken_out(arguments)
    assert taken == {"states": (0, 2), "options": ("b",)}
    mine: dict[str, Any] = {"states": [1, 2, 3], "options": {"a": 4, "b": 5}, "kept": [6]}
    take_out(mine, taken)
    assert mine == {"states": [1, 3], "options": {"b": 5}, "kept": [6]}
    assert before.written({**arguments, "states": [A, A, B]}) == "states"  # in another order
