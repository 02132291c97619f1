"""Holders and tensors compared together."""

from __future__ import annotations

import collections
import types
from typing import Any

import torch

from fusion_compile._capture.watch.portions import Portion, kinds_of, portions_of
from fusion_compile._capture.watch.watched_holder import WatchedHolder


def test_whole_containers_of_every_kind() -> None:
    numbers, names, cell = [1.5], {"a": 2.5}, types.CellType(3.5)
    portion = Portion([WatchedHolder(numbers, "numbers"), WatchedHolder(names, "names"), WatchedHolder(cell, "cell")])
    for change, undo in [
        (lambda: numbers.append(0.0), lambda: numbers.pop()),
        (lambda: names.update(b=0.0), lambda: names.pop("b")),
    ]:
        assert portion.is_as_it_was()
        change()
        assert not portion.is_as_it_was()
        undo()
    cell.cell_contents = 4.5
    assert not portion.is_as_it_was()


def test_single_keys_of_many_and_of_few() -> None:
    container: dict[str, Any] = {"a": 1, "b": 2, "c": 3, "other": 4}
    for keys in (("a",), ("a", "b"), ("a", "b", "c")):
        portion = Portion([WatchedHolder(container, "d", keys=keys)])
        container["other"] = object()
        assert portion.is_as_it_was()
        container["a"] = object()
        assert not portion.is_as_it_was()


def test_a_key_that_is_gone() -> None:
    container = {"a": 1}
    portion = Portion([WatchedHolder(container, "d", keys=("a",))])
    container.clear()
    assert not portion.is_as_it_was()


def test_a_key_that_is_gone_from_a_dictionary_with_defaults_is_not_made() -> None:
    container: collections.defaultdict[str, int] = collections.defaultdict(int, a=1, b=2, c=3)
    portion = Portion([WatchedHolder(container, "d", keys=("a", "b", "c"))])
    assert portion.is_as_it_was()
    container.clear()
    assert not portion.is_as_it_was() and not container


def test_a_class() -> None:
    class Changed:
        x = 1

    whole, one = Portion([WatchedHolder(Changed, "Changed")]), Portion([WatchedHolder(Changed, "Changed", keys=("x",))])
    assert whole.is_as_it_was() and one.is_as_it_was()
    Changed.x = 2
    assert not whole.is_as_it_was() and not one.is_as_it_was()


def test_a_hook_on_a_tensor() -> None:
    tensor = torch.ones(2, requires_grad=True)
    portion = Portion([WatchedHolder(tensor, "tensor")])
    (tensor * 2).sum().backward()
    assert portion.is_as_it_was()
    tensor.register_hook(lambda gradient: None)
    assert not portion.is_as_it_was()


def test_portions_hold_every_holder_once_in_order() -> None:
    holders = [WatchedHolder([None] * 250, str(i)) for i in range(7)]
    found = portions_of(holders, 600)
    assert [holder for portion in found for holder in portion.holders] == holders
    assert [len(portion.holders) for portion in found] == [3, 3, 1]
    assert portions_of([], 600) == []


def test_properties_of_tensors() -> None:
    tensors = [(torch.ones(2), f"t{i}") for i in range(3)]
    lots = kinds_of(tensors, ("dtype", "shape"), 2)
    assert [len(lot.tensors) for lot in lots] == [2, 1] and all(lot.is_as_it_was() for lot in lots)
    tensors[2][0].data = torch.ones(3, dtype=torch.float64)
    assert lots[0].is_as_it_was() and not lots[1].is_as_it_was()
    assert list(lots[1].differences()) == [
        ("t2.dtype", torch.float32, torch.float64),
        ("t2.shape", torch.Size([2]), torch.Size([3])),
    ]
    gradients = kinds_of(tensors, ("requires_grad",), 3)[0]
    tensors[0][0].requires_grad_()
    assert list(gradients.differences()) == [("t0.requires_grad", False, True)]
