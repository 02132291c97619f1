"""Where iterators stand, and copies of those that go on from there."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._capture.rehearsal.iterators import copy_of, index_of, position

COPIED: dict[str, Callable[[], Iterator[Any]]] = {
    "count": lambda: itertools.count(3, 2),
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "chain": lambda: itertools.chain([1, 2, 3, 4, 5, 6, 7, 8], [9]),
    "accumulate": lambda: itertools.accumulate([1, 1, 2, 3, 5, 8]),
    "enumerate": lambda: enumerate("abcdef"),
    "range": lambda: iter(range(10)),
    "repeat": lambda: itertools.repeat(2),
}
not_in_314 = pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python copies none of itertools from 3.14 on")


@not_in_314
@pytest.mark.parametrize("kind", COPIED)
def test_it_gives_again_what_a_run_has_taken(kind: str) -> None:
    kept: dict[str, Any] = {"it": COPIED[kind]()}
    next(kept["it"])
    contents = Contents({"kept": kept})
    taken = []
    for _ in range(2):  # runs from one beginning
        taken.append([next(kept["it"]) for _ in range(3)])
        contents.restore()
        assert contents.not_put_back() == []
    assert taken[0] == taken[1] == [next(kept["it"]) for _ in range(3)]


@not_in_314
def test_everybody_who_holds_it_gets_the_same_copy() -> None:
    count = itertools.count()
    kept: dict[str, Any] = {"a": count, "b": [count]}
    contents = Contents({"kept": kept})
    next(count)
    contents.restore()
    assert kept["a"] is kept["b"][0] is not count and next(kept["a"]) == 0


def test_in_a_tuple_it_is_not_exchanged() -> None:
    count = itertools.count()
    contents = Contents({"kept": {"pair": (count, 1)}})
    next(count)
    contents.restore()
    assert len(contents.not_put_back()) == 1 and next(count) == 1


def test_nothing_is_moved_by_a_look() -> None:
    for make in COPIED.values():
        iterator, other = make(), make()
        assert position(iterator) == position(iterator)
        index_of(iterator), copy_of(iterator)
        assert [next(iterator) for _ in range(4)] == [next(other) for _ in range(4)]
    assert copy_of(x for x in "abc") is None and position(itertools.repeat(1)) is not None
