"""Which names a function reads, from its bytecode: ``CFG.kl``, ``c["w"]``, ``getattr(self, "scale", 1.0)``.

Python 3.11 to 3.14. An instruction that is not known here ends the chains at hand and nothing else.
"""

from __future__ import annotations

import dis
import functools
import types
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Link:
    """One step of a chain: an attribute's name, or an item's constant key."""

    kind: Literal["attribute", "item"]
    key: Any


@dataclass(frozen=True)
class Chain:
    """A name and what is read from it. `scope`: where the name is looked up."""

    scope: Literal["global", "free", "local"]
    name: str
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class _Constant:
    value: Any


_SILENT = {"CACHE", "EXTENDED_ARG", "PUSH_NULL", "RESUME", "PRECALL", "NOP", "KW_NAMES", "NOT_TAKEN"}
_SCOPES: dict[str, Literal["global", "free", "local"]] = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_DEREF": "free",
    "LOAD_CLASSDEREF": "free",
    "LOAD_FAST": "local",
    "LOAD_FAST_CHECK": "local",
    "LOAD_FAST_BORROW": "local",
}
_PAIRS = {"LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}


@functools.cache
def chains(code: types.CodeType) -> tuple[Chain, ...]:
    """The longest chains of `code`, each once, in order. Functions defined inside are not included."""
    found: dict[Chain, None] = {}
    stack: list[Chain | _Constant | None] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname not in _SILENT:
            _apply(instruction, stack, found)
    longer = {Chain(c.scope, c.name, c.links[:n]) for c in found for n in range(len(c.links))}
    return tuple(chain for chain in found if chain not in longer)


def _apply(instruction: dis.Instruction, stack: list[Chain | _Constant | None], found: dict[Chain, None]) -> None:
    """Push what `instruction` leaves. NULL is never pushed, so a callable lies directly below its arguments."""
    name, value = instruction.opname, instruction.argval
    if name in _SCOPES:
        _read(Chain(_SCOPES[name], value), stack, found)
    elif name in _PAIRS:
        for each in value:
            _read(Chain("local", each), stack, found)
    elif name == "STORE_FAST_LOAD_FAST":
        stack.clear()
        _read(Chain("local", value[1]), stack, found)
    elif name in ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_CONST_IMMORTAL"):
        stack.append(_Constant(value))
    elif name == "COPY" and len(stack) >= value:  # self.calls += 1
        stack.append(stack[-value])
    elif name in _ATTRIBUTES and stack:
        _extend(stack.pop(), Link("attribute", value), stack, found)
    elif (name == "BINARY_SUBSCR" or (name == "BINARY_OP" and instruction.argrepr == "[]")) and len(stack) > 1:
        key, holder = stack.pop(), stack.pop()
        _extend(holder, Link("item", key.value) if isinstance(key, _Constant) else None, stack, found)
    elif name in ("CALL", "CALL_KW") and len(stack) > (instruction.arg or 0) + (name == "CALL_KW"):
        if name == "CALL_KW":
            stack.pop()
        count = instruction.arg or 0
        arguments = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        called = stack.pop()
        holder, link = _call(called, arguments)
        _extend(holder, link, stack, found)
    else:
        stack.clear()


def _call(called: Any, arguments: list[Any]) -> tuple[Any, Link | None]:
    """``getattr(x, "name")``, ``hasattr``, ``x.get("key")`` and ``os.getenv`` read a slot like ``x.name``."""
    constants = [a.value if isinstance(a, _Constant) else None for a in arguments]
    if isinstance(called, Chain) and arguments:
        if called.name in ("getattr", "hasattr") and not called.links and len(arguments) > 1:
            return arguments[0], Link("attribute", constants[1]) if isinstance(constants[1], str) else None
        if called.links and called.links[-1] == Link("attribute", "get") and isinstance(constants[0], (str, int)):
            return Chain(called.scope, called.name, called.links[:-1]), Link("item", constants[0])
        if called.links and called.links[-1] == Link("attribute", "getenv") and isinstance(constants[0], str):
            environ = (*called.links[:-1], Link("attribute", "environ"))
            return Chain(called.scope, called.name, environ), Link("item", constants[0])
    return None, None


def _read(chain: Chain, stack: list[Chain | _Constant | None], found: dict[Chain, None]) -> None:
    found[chain] = None
    stack.append(chain)


def _extend(holder: Any, link: Link | None, stack: list[Any], found: dict[Chain, None]) -> None:
    if isinstance(holder, Chain) and link is not None:
        _read(Chain(holder.scope, holder.name, (*holder.links, link)), stack, found)
    else:
        stack.append(None)
