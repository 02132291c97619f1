"""Callables are taken apart without being called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fusion_compile._capture.python_state.callables import defaults_of, free_variables, parts_of


def plain(a: int, b: int = 2, *, c: int = 3) -> int:
    return a + b + c


class Bound:
    def method(self) -> None: ...

    @property
    def weight(self) -> float:
        raise AssertionError("a property was evaluated")


def around(queue: list[int]) -> Callable[[], int]:
    return lambda: queue[0]


def test_what_wraps_or_binds_another_callable() -> None:
    bound, items = Bound(), [1]
    cached = functools.lru_cache(plain)
    partial = functools.partial(plain, 1, b=3)
    assert parts_of(bound.method, "f") == [("f.__self__", bound), ("f", Bound.method)]
    assert parts_of(items.append, "f") == [("f.__self__", items)]
    assert parts_of(partial, "f") == [("f", plain), ("f.args", (1,)), ("f.keywords", {"b": 3}), ("f", {})]
    assert parts_of(cached, "f") == parts_of(staticmethod(plain), "f") == [("f", plain)]
    assert parts_of(functools.cached_property(plain), "f") == [("f", plain)]
    assert parts_of(vars(Bound)["weight"], "f") == [("f", vars(Bound)["weight"].fget)]


def test_nothing_else_has_parts() -> None:
    assert parts_of(plain, "f") == parts_of(3, "f") == parts_of(Bound, "f") == []


def test_closures() -> None:
    queue = [4]
    function: Any = around(queue)
    (name, cell) = free_variables(function)[0]
    function_without: Any = plain
    assert name == "queue" and cell.cell_contents is queue and free_variables(function_without) == []


def test_defaults_by_argument() -> None:
    function: Any = plain
    assert defaults_of(function) == [("b", 2), ("c", 3)]
    bare: Any = around
    assert defaults_of(bare) == []
