"""Caches of ``functools.lru_cache`` that hold tensors: what a run gets from them, and what it leaves in them."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fusion_compile._capture.rehearsal.provenance import Depends, Provenance
from fusion_compile._capture.rehearsal.reach import Found, Reach

_FROM_NOTHING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Caches whose results were seen to depend on nothing: it makes no difference whether they are computed anew."""


class ResultCaches:
    """The caches that can be reached, as they were before a run."""

    def __init__(self, caches: Iterable[Found]) -> None:
        self._before = [(found, found.value.cache_info(), bool(tensors_in(found.value))) for found in caches]

    def handed_out(self) -> list[str]:
        """Labels of those that held tensors before and were asked for one since.

        Dynamo ignores such a cache and computes the result anew, from what the weights are by then.
        """
        return [
            found.label
            for found, before, held in self._before
            if held and found.value.cache_info().hits > before.hits and found.value not in _FROM_NOTHING
        ]

    def filled(self) -> list[Found]:
        """Those that computed something since."""
        return [found for found, before, _ in self._before if found.value.cache_info().misses != before.misses]


def filled_once(first: ResultCaches, second: ResultCaches, provenance: Provenance) -> list[tuple[Found, Depends]]:
    """Caches that the first of two runs filled with tensors that depend on something, and that only gave them out in
    the second: what the first step computes counts for all later ones."""
    again = {id(found.value) for found in second.filled()}
    once = []
    for found in first.filled():
        depends = Depends.NOTHING
        for tensor in tensors_in(found.value):
            depends |= provenance.of(tensor)
        if depends and id(found.value) not in again:
            once.append((found, depends))
    return once


def is_filled_from_nothing(cache: Any, provenance: Provenance) -> bool:
    """Whether nothing that `cache` holds depends on inputs, weights or random numbers; it is known from then on."""
    if any(provenance.of(tensor) for tensor in tensors_in(cache)):
        return False
    _FROM_NOTHING.add(cache)
    return True


def tensors_in(cache: Any) -> list[Tensor]:
    """The tensors in the results that `cache` holds, and those among its arguments.

    Not those that an argument leads to: a method's first argument is the module, with all its weights.
    """
    held = gc.get_referents(cache)
    tables = [inner for inner in held if type(inner) is dict]
    keys = [key for table in tables for key in table if type(key) is not str]
    arguments = [
        a for key in keys for a in (key if isinstance(key, (tuple, list)) else (key,)) if isinstance(a, Tensor)
    ]
    results = [*held, *(result for table in tables for result in table.values())]
    no_results = {*map(id, keys), *map(id, tables)}
    own = [r for r in results if id(r) not in no_results and not isinstance(r, (type, types.FunctionType))]
    return [tensor for _, tensor in Reach({"": [*own, *arguments]}, with_globals=False).tensors.values()]
