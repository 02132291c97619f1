"""Functions that read a number's value in C, called on numbers that are followed: those of ``math`` and numpy, and the
conversions ``float(n)`` and ``int(n)``."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fusion_compile._capture.numbers.expressions import OF_MATH, OF_NUMPY
from fusion_compile._capture.python_state.whose_code import is_foreign_package

CONVERSIONS = (float, int)


class Followed(NamedTuple):
    """How numbers are followed.

    Attributes:
        is_one: Whether a value is a followed number.
        value: The plain number for which one stands.
        answer: From ``"math.cos"``, ``"numpy.exp"`` or ``"float"`` and its arguments, one of them followed, to the
            result; NotImplemented: as the function answers.
    """

    is_one: Callable[[Any], bool]
    value: Callable[[Any], Any]
    answer: Callable[[str, tuple[Any, ...]], Any]


class _Asking:
    """A function that answers for followed numbers, and otherwise is what it was."""

    def __init__(self, name: str, function: Any, followed: Followed) -> None:
        self._name, self.__wrapped__, self._followed = name, function, followed

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not named and any(map(self._followed.is_one, arguments)):
            answered = self._followed.answer(self._name, arguments)
            if answered is not NotImplemented:
                return answered
        return self.__wrapped__(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


class _AskingType(type):
    """The class of what stands for ``float`` and ``int`` in user code: a class by which `isinstance` asks."""

    own: type
    followed: Followed

    def __call__(cls, *arguments: Any) -> Any:
        if len(arguments) == 1 and cls.followed.is_one(arguments[0]):
            answered = cls.followed.answer(cls.own.__name__, arguments)
            if answered is not NotImplemented:
                return answered
        return cls.own(*arguments)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(cls.followed.value(value) if cls.followed.is_one(value) else value, cls.own)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.own)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.own

    def __hash__(cls) -> int:
        return hash(cls.own)


@contextlib.contextmanager
def calls_are_asked(followed: Followed, converting: Iterable[dict[str, Any]] = ()) -> Iterator[None]:
    """Inside, ``math.cos(n)`` of a followed number `n` is what `followed` answers.

    The functions return a plain number that has forgotten what it was computed from. They are exchanged in their
    modules, and where a module of the user's has imported one by its name (``from math import cos``).

    Args:
        followed: How numbers are followed.
        converting: Globals of user code in which ``float`` and ``int`` are asked, too.
    """
    asking = {
        id(function): _Asking(f"{module.__name__}.{name}", function, followed)
        for module, names in ((math, OF_MATH), (np, OF_NUMPY))
        for name in names
        for function in [getattr(module, name)]
    }
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for scope in (vars(math), vars(np), *_scopes_of_the_users()):
            for name, value in list(scope.items()):
                if id(value) in asking and asking[id(value)].__wrapped__ is value:
                    before.append((scope, name, value))
                    scope[name] = asking[id(value)]
        for scope in converting:
            for kind in CONVERSIONS:
                if kind.__name__ not in scope:
                    before.append((scope, kind.__name__, _ABSENT))
                    scope[kind.__name__] = _AskingType(kind.__name__, (kind,), {"own": kind, "followed": followed})
        yield
    finally:
        for scope, name, value in before:
            if value is _ABSENT:
                scope.pop(name, None)
            else:
                scope[name] = value


_ABSENT = object()


def _scopes_of_the_users() -> Iterator[dict[str, Any]]:
    """The globals of every module that is the user's, or a library's of models."""
    for name, module in list(sys.modules.items()):
        scope = getattr(module, "__dict__", None)
        if type(scope) is dict and not is_foreign_package(name):
            yield scope


def converts(code_names: Iterable[str], scope: dict[str, Any]) -> bool:
    """Whether code with these names and globals may call ``float`` or ``int``, Python's own."""
    return any(kind.__name__ in code_names and kind.__name__ not in scope for kind in CONVERSIONS)
