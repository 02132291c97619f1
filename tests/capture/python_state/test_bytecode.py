"""The chains of names that a function reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusion_compile._capture.python_state.bytecode import ALL, Chain, Link, chains, optional_names

SETTINGS: Any = None
os: Any = None


def attribute(name: str) -> Link:
    return Link("attribute", name)


def item(key: Any) -> Link:
    return Link("item", key)


def counts(self: Any) -> None:
    self.calls += 1


def closure() -> Callable[..., Any]:
    options: Any = None
    return lambda: options.weight


CASES: dict[str, tuple[Callable[..., Any], set[Chain]]] = {
    "attributes": (
        lambda: SETTINGS.loss.weight,
        {Chain("global", "SETTINGS", (attribute("loss"), attribute("weight")))},
    ),
    "constant items": (
        lambda: SETTINGS["loss"][0],
        {Chain("global", "SETTINGS", (item("loss"), item(0)))},
    ),
    "an argument": (lambda self: self.scale, {Chain("local", "self", (attribute("scale"),))}),
    "what is added to": (counts, {Chain("local", "self", (attribute("calls"),))}),
    "a closure": (closure(), {Chain("free", "options", (attribute("weight"),))}),
    "a product": (
        lambda self, x: x * self.scale,
        {Chain("local", "x"), Chain("local", "self", (attribute("scale"),))},
    ),
    "a method's arguments": (
        lambda self, x: self.act(x.y, self.a["b"]),
        {
            Chain("local", "self", (attribute("act"),)),
            Chain("local", "x", (attribute("y"),)),
            Chain("local", "self", (attribute("a"), item("b"))),
        },
    ),
    "getattr with a constant name": (
        lambda self: getattr(self, "scale", 1.0).item,  # type: ignore[union-attr]
        {Chain("global", "getattr"), Chain("local", "self", (attribute("scale"), attribute("item")))},
    ),
    "getattr with a computed name": (
        lambda self, name: getattr(self, name),
        {Chain("global", "getattr"), Chain("local", "self", (ALL,)), Chain("local", "name")},
    ),
    "getattr with a formatted name": (
        lambda self, i: getattr(self.a, f"x{i}", self.b + 1),
        {
            Chain("global", "getattr"),
            Chain("local", "self", (attribute("a"), ALL)),
            Chain("local", "self", (attribute("b"),)),
            Chain("local", "i"),
        },
    ),
    "all attributes": (
        lambda self: (vars(self.a)["b"], self.c.__dict__["d"]),
        {
            Chain("global", "vars"),
            Chain("local", "self", (attribute("a"), ALL)),
            Chain("local", "self", (attribute("c"), ALL)),
        },
    ),
    "get with a constant key": (
        lambda: SETTINGS.loss.get("weight", 1.0),
        {
            Chain("global", "SETTINGS", (attribute("loss"), attribute("get"))),
            Chain("global", "SETTINGS", (attribute("loss"), item("weight"))),
        },
    ),
    "getenv": (
        lambda: os.getenv("WEIGHT"),
        {
            Chain("global", "os", (attribute("getenv"),)),
            Chain("global", "os", (attribute("environ"), item("WEIGHT"))),
        },
    ),
    "a computed item ends the chain": (
        lambda self, i: self.layers[i].scale,
        {Chain("local", "self", (attribute("layers"),)), Chain("local", "i")},
    ),
    "keyword arguments": (
        lambda self, f: f(self.a, key=self.b).c,
        {Chain("local", "f"), Chain("local", "self", (attribute("a"),)), Chain("local", "self", (attribute("b"),))},
    ),
    "nothing": (lambda: 1, set()),
}


@pytest.mark.parametrize(("function", "expected"), CASES.values(), ids=CASES)
def test_chains(function: Callable[..., Any], expected: set[Chain]) -> None:
    assert set(chains(function.__code__)) == expected


def test_optional_names_are_the_strings_beside_getattr_and_hasattr() -> None:
    def asks(self: Any) -> Any:
        if hasattr(self, "cache"):
            return self.cache
        return [getattr(x, "scale", "not a name") for x in self.layers]

    assert {"cache", "scale"} <= optional_names(asks.__code__) and "not a name" not in optional_names(asks.__code__)
    assert optional_names((lambda self: self.scale + len("scale")).__code__) == set()


def test_a_prefix_of_a_chain_is_not_named_again() -> None:
    assert len(chains((lambda self: (self.a, self.a.b)).__code__)) == 1
