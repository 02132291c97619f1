"""Which names a function reads, from its bytecode: ``CFG.kl``, ``c["w"]``, ``getattr(self, "scale", 1.0)``.

`names_of` is quick and tells globals from other names; `chains` follows what is read from them. Python 3.11 to 3.14. An
instruction that is not known here ends the chains at hand and nothing else.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_LOAD_GLOBAL = dis.opmap["LOAD_GLOBAL"]
_BY_NAME = {dis.opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME") if name in dis.opmap}
_EXTENDED = dis.EXTENDED_ARG
_IMPORT = dis.opmap["IMPORT_NAME"]


class Names(NamedTuple):
    """`of_globals`: names that the bytecode loads, stores or deletes as globals. `others`: all names besides, which
    may be attributes of a module that is one of the globals. `imported`: modules that the code itself imports."""

    of_globals: frozenset[str]
    others: frozenset[str]
    imported: frozenset[str] = frozenset()


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> Names:
    """The names in `code` and in the code that is nested in it."""
    found: set[str] = set()
    every: set[str] = set()
    imported: set[str] = set()
    for part in _with_nested(code):
        every.update(part.co_names)
        found.update(_named_by(part, lambda operation: operation == _LOAD_GLOBAL or operation in _BY_NAME))
        imported.update(_named_by(part, lambda operation: operation == _IMPORT))
    return Names(frozenset(found), frozenset(every), frozenset(imported))


@functools.lru_cache(maxsize=4096)
def optional_names(code: types.CodeType) -> frozenset[str]:
    """Names that `code`, or code nested in it, may ask for with ``getattr(self, "scale", None)`` or ``hasattr``."""
    return frozenset(
        constant
        for part in _with_nested(code)
        if {"getattr", "hasattr"} & set(part.co_names)
        for constant in part.co_consts
        if isinstance(constant, str) and constant.isidentifier()
    )


def _named_by(code: types.CodeType, is_wanted: Callable[[int], bool]) -> Iterator[str]:
    raw = code.co_code
    extended = 0
    for at in range(0, len(raw), 2):
        operation, argument = raw[at], raw[at + 1] | extended
        extended = argument << 8 if operation == _EXTENDED else 0
        if is_wanted(operation):
            # The lowest bit of LOAD_GLOBAL asks for a null before it.
            yield code.co_names[argument >> 1 if operation == _LOAD_GLOBAL else argument]


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


@dataclass(frozen=True)
class Link:
    """One step of a chain: an attribute's name, an item's constant key, or all attributes where code computes names."""

    kind: Literal["attribute", "item", "all"]
    key: Any


ALL = Link("all", None)


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
_COMPUTED_FROM_TWO = {"BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "FORMAT_WITH_SPEC"}
_COMPUTED_FROM_ONE = {"FORMAT_SIMPLE", "CONVERT_VALUE", "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "TO_BOOL"}
_COMPUTED_FROM_MANY = {"BUILD_STRING", "BUILD_TUPLE", "BUILD_LIST"}


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
        _extend(stack.pop(), ALL if value == "__dict__" else Link("attribute", value), stack, found)
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
    elif (taken := _taken(instruction)) is not None and len(stack) >= taken:
        del stack[len(stack) - taken :]
        stack.append(None)
    else:
        stack.clear()


def _taken(instruction: dis.Instruction) -> int | None:
    """How many values `instruction` makes its one result from; None for other instructions."""
    name, argument = instruction.opname, instruction.arg or 0
    if name in _COMPUTED_FROM_MANY:
        return argument
    if name == "FORMAT_VALUE":
        return 2 if argument & 4 else 1  # with a format
    return 2 if name in _COMPUTED_FROM_TWO else 1 if name in _COMPUTED_FROM_ONE else None


def _call(called: Any, arguments: list[Any]) -> tuple[Any, Link | None]:
    """``getattr(x, "name")``, ``hasattr``, ``x.get("key")`` and ``os.getenv`` read a slot like ``x.name``; ``vars(x)``
    and a computed name read all."""
    constants = [a.value if isinstance(a, _Constant) else None for a in arguments]
    if isinstance(called, Chain) and arguments:
        if called.name in ("getattr", "hasattr") and not called.links and len(arguments) > 1:
            return arguments[0], Link("attribute", constants[1]) if isinstance(constants[1], str) else ALL
        if called.name == "vars" and not called.links:
            return arguments[0], ALL
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
    if isinstance(holder, Chain) and link is not None and holder.links[-1:] != (ALL,):
        _read(Chain(holder.scope, holder.name, (*holder.links, link)), stack, found)
    else:
        stack.append(None)
