"""A watched holder lists what is another object than before."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fusion_compile._capture.watch.watched_holder import WatchedHolder


def test_a_set_and_a_tensors_hooks_differ_by_content() -> None:
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(print)
    active = {1}
    holders = [WatchedHolder(tensor, "t's gradient hook", ""), WatchedHolder(active, "s")]
    for holder in holders:
        holder.remember()
    assert [list(holder.differences()) for holder in holders] == [[], []]
    tensor.register_hook(repr)
    active.add(3)
    names = [holder.label_of(key) for holder in holders for key, _, _ in holder.differences()]
    assert names == ["t's gradient hook", "s"]


def test_a_container_as_it_was() -> None:
    pairs: list[tuple[Any, Any]] = [({"a": 1}, {"b": 2}), ([1], [2]), ({1}, {2})]
    for container, more in pairs:
        holder = WatchedHolder(container, "c")
        holder.remember()
        before = copy.copy(container)
        getattr(container, "extend" if isinstance(container, list) else "update")(more)
        assert holder.as_it_was() == before != container
    assert WatchedHolder({"a": 1}, "c", keys=("a",)).as_it_was() is None


def test_differences_by_key() -> None:
    container: dict[str, Any] = {"kept": 1, "replaced": 2, "removed": 3}
    whole, one = WatchedHolder(container, "d"), WatchedHolder(container, "d", keys=("replaced",))
    for holder in (whole, one):
        holder.remember()
    container.update(replaced=20, added=4)
    del container["removed"]
    found = [(key, repr(before), repr(after)) for key, before, after in whole.differences()]
    assert found == [("replaced", "2", "20"), ("removed", "3", "nothing"), ("added", "nothing", "4")]
    assert [key for key, _, _ in one.differences()] == ["replaced"]
