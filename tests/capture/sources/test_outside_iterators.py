"""An iterator that was alive before and moved on is found, whatever moved it; nothing is taken from it."""

from __future__ import annotations

import collections
import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fusion_compile._capture.sources.outside_iterators import OutsideIterators

KINDS: dict[str, Callable[[], Iterator[Any]]] = {
    "list": lambda: iter([1, 2, 3]),
    "tuple": lambda: iter((1, 2, 3)),
    "text": lambda: iter("abc"),
    "dict": lambda: iter({1: 2, 3: 4}),
    "items": lambda: iter({1: 2, 3: 4}.items()),
    "set": lambda: iter({1, 2}),
    "deque": lambda: iter(collections.deque([1, 2])),
    "reversed": lambda: reversed([1, 2]),
    "enumerate": lambda: enumerate([1, 2]),
    "zip": lambda: zip([1, 2], [3, 4], strict=True),
    "map": lambda: map(str, [1, 2]),
    "filter": lambda: filter(None, [1, 2]),
    "count": lambda: itertools.count(3),
    "cycle": lambda: itertools.cycle([1, 2]),
    "islice": lambda: itertools.islice([1, 2, 3], 2),
    "chain": lambda: itertools.chain([1, 2], [3]),
    "groupby": lambda: itertools.groupby([1, 1, 2]),
    "tee": lambda: itertools.tee([1, 2])[0],
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_iterator_that_moves_is_found_each_time_it_moves(kind: str) -> None:
    expected = list(itertools.islice(KINDS[kind](), 2))
    iterator = KINDS[kind]()
    outside = OutsideIterators()
    assert outside.moved() == []
    first = next(iterator)
    assert outside.moved() != []
    assert outside.moved() == []
    second = next(iterator)
    assert outside.moved() != []
    assert kind == "groupby" or [first, second] == expected


def test_a_cycle_is_found_in_its_second_round() -> None:
    cycle = itertools.cycle([1, 2])
    for _ in range(3):
        next(cycle)
    outside = OutsideIterators()
    assert outside.moved() == []
    assert next(cycle) == 2
    assert outside.moved() == [cycle]


def test_numpys_generators_are_found_when_they_draw() -> None:
    own, old = np.random.default_rng(0), np.random.RandomState(0)
    outside = OutsideIterators()
    assert outside.moved_numpy() == []
    own.normal()
    assert outside.moved_numpy() == [own]
    old.rand()
    assert outside.moved_numpy() == [old]


def test_suspended_generators_and_pythons_randoms_are_known() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    fresh, own = numbers(), random.Random(0)
    outside = OutsideIterators()
    assert id(fresh.gi_frame) in outside.frames  # type: ignore[attr-defined]
    assert id(own) in outside.randoms
    outside.forget()
    assert outside.frames == set() and outside.moved() == []


def test_a_librarys_counter_is_its_own() -> None:
    # In a process of its own: this one may have put aside the module that holds the counter (`gc.freeze`).
    program = """
import threading
from fusion_compile._capture.sources.outside_iterators import is_librarys_own
assert is_librarys_own(threading._counter.__self__)
assert not is_librarys_own(iter([1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
