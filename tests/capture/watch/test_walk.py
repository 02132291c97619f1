"""What is reached from the roots and from what was read."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._capture.watch.walk import LONGEST, Walk
from fusion_compile._capture.watch.watched_holder import WatchedHolder


def walked(root: Any, names: set[str] | None = None, slots: list[Slot] | None = None) -> Walk:
    walk = Walk(names)
    walk.roots({"root": root})
    walk.slots(slots or [])
    walk.finish()
    return walk


def names_of(holders: list[WatchedHolder]) -> set[str]:
    """Every watched key by its full name."""
    found = set()
    for holder in holders:
        holder.remember()
        found |= {holder.label_of(key) for key in holder.held}
    return found


def test_objects_by_the_names_that_code_has() -> None:
    value = types.SimpleNamespace(read=1, unread=2, inner=types.SimpleNamespace(read=3))
    assert {"root.read", "root.inner", "root.inner.read"} <= names_of(walked(value, {"read", "inner"}).often)
    assert "root.unread" not in names_of(walked(value, {"read", "inner"}).often)
    assert "root.inner.read" not in names_of(walked(value, {"read"}).often)
    assert "root.unread" in names_of(walked(value).often)


def test_modules_whole_what_is_read_often() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    walk = walked(model, set(), [Slot(vars(model[1]), "p", "self.p")])
    assert {"root.0.weight", "root.0", "root.1", "root.1.p"} <= names_of(walk.often + walk.modules)
    assert "root.0.in_features" not in names_of(walk.often + walk.modules)
    assert {"root.0.in_features", "root.1.training", "Dropout.forward"} <= names_of(walk.seldom)
    assert [label for _, label in walk.tensors.values()] == ["root.0.weight", "root.0.bias"]


def test_a_tensor_in_two_places_is_found_once() -> None:
    shared = torch.ones(2)
    assert len(walked([shared, {"a": shared}]).tensors) == 1


def test_circles_end() -> None:
    first: list[Any] = []
    first.append({"first": first})
    value = types.SimpleNamespace()
    value.itself = value
    assert names_of(walked([first, value]).often) >= {"root[0][0]", "root[0][0]['first']", "root[1].itself"}


def test_depth_is_bounded() -> None:
    deep: list[Any] = [1.0]
    for _ in range(20):
        deep = [deep]
    assert len(walked(deep).often) == 7


def test_a_long_container_by_its_length() -> None:
    long = list(range(LONGEST + 1))
    walk = walked({"long": long})
    assert [(len(c), label) for c, label in walk.sized] == [(LONGEST + 1, "root['long']")]
    assert names_of(walk.often + walk.modules) == {"root['long']"}


def test_globals_one_by_one_and_their_contents() -> None:
    scope = {"SETTINGS": types.SimpleNamespace(a=1), "other": 2}
    walk = walked(None, {"a"}, [Slot(scope, "SETTINGS", "SETTINGS")])
    assert names_of(walk.often + walk.modules) == {"SETTINGS", "SETTINGS.a", "SETTINGS.__class__"}


def test_what_was_looked_for_and_absent() -> None:
    """Of a module the number of attributes is watched instead."""
    model, value = nn.Tanh(), types.SimpleNamespace()
    walk = walked([model, value], set(), [Slot(vars(model), "gain", "m.gain"), Slot(vars(value), "gain", "v.gain")])
    assert [slot.label for slot in walk.missing] == ["root[1].gain"]
    assert [container for container, _ in walk.sized] == [vars(model)]
