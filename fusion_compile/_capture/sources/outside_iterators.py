"""Iterators, generators and numpy's random generators that were alive before a run, and which of them it moved on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import numpy as np

from fusion_compile._tracked import referrers, tracked

_LIST: type = type(iter([]))
_ITERTOOLS = tuple(v for v in vars(itertools).values() if isinstance(v, type))
_DEEPEST = 4
"""Iterators inside of iterators that are looked into."""
_WARNS_WHEN_REDUCED = (3, 12) <= sys.version_info < (3, 14)


_GLOBAL_GENERATORS = (random.random.__self__, np.random.rand.__self__)  # type: ignore[attr-defined]
_Place: TypeAlias = tuple[Any, Callable[[], Any], Any]
"""An object, what tells its position, and the position that was told last."""


class OutsideIterators:
    """What is alive when this is made. One walk over what the garbage collector tracks: 0.1 s for 300,000 objects.

    `frames`: ids of the frames of suspended generators. `randoms`: ids of instances of `random.Random`.

    Not seen: a bare ``iter(range(n))``, which the collector does not track; `zip`, `map` and `filter` themselves (what
    they read is seen); open files; from Python 3.14 on, `itertools.cycle` after its first round.
    """

    def __init__(self) -> None:
        self.frames: set[int] = set()
        self.randoms: set[int] = set()
        self._alive: list[Any] = []  # ids are names only while their objects live
        self._positions: list[_Place] = []
        self._numpy: list[_Place] = []
        is_kind: dict[type, str] = {}
        for thing in itertools.chain(tracked(), _GLOBAL_GENERATORS):
            kind = type(thing)
            what = is_kind.get(kind)
            if what is None:
                what = is_kind[kind] = _what_it_is(kind)
            if what:
                self._note(what, thing)

    def _note(self, what: str, thing: Any) -> None:
        if what == "generator":
            if thing.gi_frame is not None and not thing.gi_running:
                self._alive.append(thing.gi_frame)
                self.frames.add(id(thing.gi_frame))
        elif what == "random":
            self._alive.append(thing)
            self.randoms.add(id(thing))
        elif what == "numpy":
            state = functools.partial(_numpy_position, thing)
            self._numpy.append((thing, state, state()))
        else:
            where = _where(thing)
            if where is not None:
                self._positions.append((thing, where, where()))

    def moved(self) -> list[Any]:
        """The iterators that moved on since they were last asked for."""
        return _moved(self._positions)

    def moved_numpy(self) -> list[Any]:
        """The same for numpy's random generators."""
        return _moved(self._numpy)

    def forget(self) -> None:
        """Let go of everything."""
        self._alive, self._positions, self._numpy, self.frames, self.randoms = [], [], [], set(), set()


def _moved(places: list[_Place]) -> list[Any]:
    found = []
    for i, (thing, where, before) in enumerate(places):
        now = where()
        if now != before:
            places[i] = (thing, where, now)
            found.append(thing)
    return found


_KEPT_METHODS = (types.BuiltinMethodType, types.MethodWrapperType)


def is_librarys_own(iterator: Any) -> bool:
    """Whether a module or class of torch or of Python holds `iterator`: a counter for names, which decides nothing."""
    holders = referrers(iterator)
    methods = [h for h in holders if isinstance(h, _KEPT_METHODS)]  # a kept ``count(1).__next__``
    holders += referrers(*methods) if methods else []
    for holder in holders:
        if isinstance(holder, dict):
            name = holder.get("__module__") or (holder.get("__name__") if "__spec__" in holder else None)
            if isinstance(name, str) and name.partition(".")[0] in (*sys.stdlib_module_names, "torch"):
                return name != "__main__"
    return False


def _what_it_is(kind: type) -> str:
    if kind is types.GeneratorType:
        return "generator"
    if issubclass(kind, random.Random):
        return "random"
    module = type.__getattribute__(kind, "__module__")
    if not isinstance(module, str):
        return ""
    if module.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState"):
        return "numpy"
    if module not in _BUILT_IN:
        return ""
    has_position = kind is enumerate or kind in _ITERTOOLS or {"__next__", "__length_hint__"} <= vars(kind).keys()
    return "iterator" if has_position else ""


_BUILT_IN = ("builtins", "itertools", "collections", "_collections")
"""A class written in Python is asked for nothing: its attributes are seen by whoever compares them."""


def _where(iterator: Any) -> Callable[[], Any] | None:
    """A function whose result stays equal as long as `iterator` has not moved. It takes nothing from the iterator and
    calls nothing of the user's. Methods of C where there are any: this runs at each return of a user's function."""
    kind = type(iterator)
    if kind is itertools.count:
        return cast(Callable[[], Any], iterator.__repr__)
    if kind in (_LIST, enumerate):
        return cast(Callable[[], Any], iterator.__reduce__)  # the list itself, and an index
    if kind in _ITERTOOLS:
        return None if kind.__name__ == "_tee_dataobject" else functools.partial(_reduced, iterator, _DEEPEST)
    return cast(Callable[[], Any], iterator.__length_hint__)


def _reduced(iterator: Any, depth: int) -> Any:
    try:
        with warnings.catch_warnings() if _WARNS_WHEN_REDUCED else contextlib.nullcontext():
            if _WARNS_WHEN_REDUCED:
                warnings.simplefilter("ignore")
            parts = iterator.__reduce__()
    except (TypeError, AttributeError):
        return None
    return list(_plain(parts[1:], depth))


def _plain(parts: Any, depth: int) -> Iterator[Any]:
    for part in parts:
        kind = type(part)
        if kind in (int, bool):
            yield part
        elif kind is tuple and depth:
            yield list(_plain(part, depth - 1))
        elif depth and kind in _ITERTOOLS:
            yield _reduced(part, depth - 1)
        elif _what_it_is(kind) == "iterator" and (where := _where(part)) is not None:
            yield where()
        elif kind is list:
            yield len(part)


def _numpy_position(generator: Any) -> str:
    state = generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state(legacy=False)
    return repr(
        [
            {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in part.items()}
            if isinstance(part, dict)
            else part
            for part in state.values()
        ]
    )
