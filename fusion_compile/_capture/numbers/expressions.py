"""Arithmetic on plain numbers, kept as Python did it, so that it can be done again with other numbers.

An expression is evaluated by Python's own operators in the order in which the program used them: the result has the
program's rounding. An algebra system would reorder sums and multiply constants out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_CHARACTERS = 160
"""Longer texts of expressions are cut."""

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "and": "&",
    "or": "|",
    "xor": "^",
    "lshift": "<<",
    "rshift": ">>",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
OF_MATH: tuple[str, ...] = (
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "atan2",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "acosh",
    "atanh",
)
OF_MATH += ("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "cbrt", "pow", "fmod", "hypot", "copysign")
OF_MATH += ("erf", "erfc", "gamma", "lgamma", "degrees", "radians", "fabs")
"""Functions of ``math`` that make a float of numbers; as operations they are called ``"math.sin"``."""

OF_NUMPY: tuple[str, ...] = ("sin", "cos", "tan", "arcsin", "arccos", "arctan", "arctan2", "sinh", "cosh", "tanh")
OF_NUMPY += ("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "square", "power", "minimum", "maximum")
OF_NUMPY += ("abs", "absolute", "clip", "floor", "ceil", "sign", "hypot")
"""The same of numpy, called ``"numpy.sin"``; the results are plain numbers."""


def _of_numpy(name: str) -> Callable[..., Any]:
    function = getattr(np, name)
    return lambda *arguments: function(*arguments).item()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"math.{name}": getattr(math, name) for name in OF_MATH},
    **{f"numpy.{name}": _of_numpy(name) for name in OF_NUMPY},
    **{name: getattr(operator, name + "_" if name in ("and", "or") else name) for name in _INFIX},
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "round": round,
    "float": float,
    "int": int,
    "is_integer": float.is_integer,
}


@dataclass(frozen=True, eq=False)
class Expression:
    """`name` of an operation on `arguments`, which are expressions or plain numbers; or input number `index`."""

    name: str
    arguments: tuple[Any, ...] = ()
    index: int = -1

    def __call__(self, values: Sequence[Any]) -> Any:
        """The result for these input numbers.

        Raises:
            ArithmeticError, ValueError: Python raises them for these numbers (a division by zero).
        """
        known: dict[int, Any] = {}
        todo: list[Expression] = [self]
        while todo:
            top = todo[-1]
            missing = [a for a in top.arguments if isinstance(a, Expression) and id(a) not in known]
            if missing:
                todo += missing
                continue
            todo.pop()
            arguments = [known[id(a)] if isinstance(a, Expression) else a for a in top.arguments]
            known[id(top)] = values[top.index] if top.index >= 0 else _compute(top.name, arguments)
        return known[id(self)]

    def inputs(self) -> set[int]:
        """The indices of the input numbers that it reads."""
        found: set[int] = set()
        seen: set[int] = set()
        todo: list[Expression] = [self]
        while todo:
            at = todo.pop()
            if id(at) not in seen:
                seen.add(id(at))
                found |= {at.index} - {-1}
                todo += [a for a in at.arguments if isinstance(a, Expression)]
        return found

    def __str__(self) -> str:
        return _text(self, MOST_CHARACTERS)


def number(index: int, name: str) -> Expression:
    """Input number `index`, written as `name`."""
    return Expression(name, index=index)


def constant(value: Any) -> Expression:
    """A value that does not depend on the input numbers."""
    return Expression("constant", (value,))


def can_apply(name: str) -> bool:
    """Whether expressions know the operation `name` (``"add"``, ``"floor"``)."""
    return name in _FUNCTIONS


def apply(name: str, *arguments: Any) -> Expression:
    """The operation `name` on expressions and plain numbers."""
    return Expression(name, arguments)


def _compute(name: str, arguments: list[Any]) -> Any:
    return arguments[0] if name == "constant" else _FUNCTIONS[name](*arguments)


def _text(at: Any, room: int) -> str:
    if room <= 0:
        return "…"
    if not isinstance(at, Expression):
        return repr(at)
    if at.index >= 0:
        return at.name
    if at.name == "constant":
        return repr(at.arguments[0])
    parts = [_text(a, room // max(1, len(at.arguments)) - 4) for a in at.arguments]
    if at.name not in _INFIX:
        return f"{at.name}({', '.join(parts)})"
    wrapped = [
        f"({part})" if isinstance(a, Expression) and a.name in _INFIX else part
        for a, part in zip(at.arguments, parts, strict=True)
    ]
    return f" {_INFIX[at.name]} ".join(wrapped)
