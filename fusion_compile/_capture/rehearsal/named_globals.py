"""Which globals a function names, its nested functions, comprehensions and lambdas included."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple

from fusion_compile.passes._user_frame import is_the_users

_LOAD_GLOBAL = dis.opmap["LOAD_GLOBAL"]
_BY_NAME = {dis.opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME") if name in dis.opmap}
_EXTENDED = dis.EXTENDED_ARG

NOT_FOLLOWED = {
    *sys.stdlib_module_names,
    *("torch", "fusion_compile", "numpy", "scipy", "sympy", "pandas", "matplotlib", "PIL", "triton", "rich", "tqdm"),
    *("pytest", "_pytest", "IPython", "huggingface_hub", "tokenizers", "safetensors", "networkx"),
    *("httpx", "httpcore", "requests", "urllib3", "psutil", "filelock", "packaging", "yaml", "regex"),
}
"""Packages whose globals, and whose objects unless said otherwise, are not a training program's state."""


class Names(NamedTuple):
    """`of_globals`: names that the bytecode loads, stores or deletes as globals. `others`: all names besides, which
    may be attributes of a module that is one of the globals."""

    of_globals: frozenset[str]
    others: frozenset[str]


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> Names:
    """The names in `code` and in the code that is nested in it."""
    found: set[str] = set()
    every: set[str] = set()
    for part in _with_nested(code):
        every.update(part.co_names)
        found.update(_globals_of(part))
    return Names(frozenset(found), frozenset(every))


def _globals_of(code: types.CodeType) -> Iterator[str]:
    raw = code.co_code
    extended = 0
    for at in range(0, len(raw), 2):
        operation, argument = raw[at], raw[at + 1] | extended
        extended = argument << 8 if operation == _EXTENDED else 0
        if operation == _LOAD_GLOBAL:
            yield code.co_names[argument >> 1]  # the lowest bit asks for a null before it
        elif operation in _BY_NAME:
            yield code.co_names[argument]


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def follows_globals(function: types.FunctionType) -> bool:
    """Whether the globals of `function` may be a training program's state: it is a user's or a model library's."""
    module = function.__globals__.get("__name__")
    if not isinstance(module, str) or module.partition(".")[0] in NOT_FOLLOWED:
        return False
    return _is_the_users(function.__code__.co_filename)


def is_followed_module(module: types.ModuleType) -> bool:
    """Whether the attributes of `module` that a function names are looked at."""
    name = vars(module).get("__name__")
    return isinstance(name, str) and name.partition(".")[0] not in NOT_FOLLOWED


@functools.lru_cache(maxsize=4096)
def _is_the_users(path: str) -> bool:
    return is_the_users(path)
