"""Functions of Python's ``math``, called on numbers that are followed."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from fusion_compile._capture.numbers.expressions import OF_MATH

Answer = Callable[[str, tuple[Any, ...]], Any]
"""From ``"math.cos"`` and its arguments, one of them followed, to the result; NotImplemented: as ``math`` answers."""


@contextlib.contextmanager
def math_is_asked(is_followed: Callable[[Any], bool], answer: Answer) -> Iterator[None]:
    """Inside, ``math.cos(n)`` of a followed number `n` is what `answer` says.

    The functions read a number's value in C, and what they return is a plain number that has forgotten it. A function
    that user code imported by its name (``from math import cos``) is not seen.
    """
    own = {name: getattr(math, name) for name in OF_MATH}

    def asking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def ask(*arguments: Any) -> Any:
            if any(map(is_followed, arguments)):
                answered = answer(f"math.{name}", arguments)
                if answered is not NotImplemented:
                    return answered
            return function(*arguments)

        return ask

    try:
        for name, function in own.items():
            setattr(math, name, asking(name, function))
        yield
    finally:
        for name, function in own.items():
            setattr(math, name, function)
