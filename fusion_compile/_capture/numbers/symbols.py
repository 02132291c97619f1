"""Symbolic numbers in the slots of changing ones, and a record of what Python asks of them.

Torch's `SymInt` and `SymFloat` stand for the numbers. They are no subclasses of int and float, so no C function reads
their value unseen. Every operation on them is kept as Python would do it on plain numbers (`Expression`), because the
algebra behind torch's own symbols rounds otherwise (``1.0 // 0.1`` is 9.0, the algebra says 10).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch

from fusion_compile._capture.numbers import _compat
from fusion_compile._capture.numbers.expressions import Expression, apply, can_apply, constant, number
from fusion_compile._capture.numbers.math_calls import Followed, calls_are_asked, converts
from fusion_compile._capture.python_state.slots import Slot, slots_kept, write
from fusion_compile._capture.python_state.whose_code import is_user_code
from fusion_compile._capture.sources.who_asks import asker, asks_aside, innermost_user, line_of

_RENAMED = {"int_truediv": "truediv", "float_truediv": "truediv", "int_floordiv": "floordiv", "float_pow": "pow"}
_RENAMED |= {"pow_by_natural": "pow", "sym_float": "float", "sym_int": "int"}
_REFLECTED = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"}
_REFLECTED |= {"int_truediv", "float_truediv", "int_floordiv", "float_pow", "pow_by_natural"}


class Condition(NamedTuple):
    """The program asked for the value of `expression` and went on with `outcome`. `where`: ``"file:line"``, ``""``."""

    expression: Expression
    outcome: Any
    where: str

    def holds(self, values: Sequence[Any]) -> bool:
        """Whether these numbers give the same outcome."""
        try:
            now = self.expression(values)
        except (ArithmeticError, ValueError, TypeError):
            return False
        return same_number(now, self.outcome)

    def __str__(self) -> str:
        text = str(self.expression)
        if self.outcome is True:
            return text
        return f"not ({text})" if self.outcome is False else f"{text} == {self.outcome!r}"


class _OneObject:
    """A copy of a symbol, in a copied model too, is the symbol: it stands for the same number in the same run."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self


class _Int(_OneObject, torch.SymInt):
    """A symbolic int that is an instance of int to user code: `isinstance` asks for ``__class__``."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int if _is_asked_by_user(sys._getframe(1)) else _Int


class _Float(_OneObject, torch.SymFloat):
    """The same for float."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return float if _is_asked_by_user(sys._getframe(1)) else _Float


class _Bool(_OneObject, torch.SymBool):
    """The same for bool."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return bool if _is_asked_by_user(sys._getframe(1)) else _Bool


_ALL = frozenset((*_compat.SYMBOLIC, _Int, _Float, _Bool))
_FOR_USERS: dict[type, type] = {torch.SymInt: _Int, torch.SymFloat: _Float, torch.SymBool: _Bool}


def as_user_sees_it(symbolic: Any) -> Any:
    """The same object, which user code takes for a plain number. Torch's own code must tell the two apart."""
    kind = _FOR_USERS.get(type(symbolic))
    if kind is not None:
        object.__setattr__(symbolic, "__class__", kind)
    return symbolic


def same_number(a: Any, b: Any) -> bool:
    """Whether two plain numbers are one to every program: -0.0 and 0.0 are not, nor are 1 and 1.0."""
    return type(a) is type(b) and (a is b or (bool(a == b) and repr(a) == repr(b)))


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None or a member of an enum: it has no parts and never changes."""
    return type(value) in (int, float, bool, str, bytes, type(None)) or isinstance(value, enum.Enum)


class Riddle(NamedTuple):
    """Something that cannot be followed: `what` was done with the numbers `inputs` at `where`."""

    what: str
    inputs: frozenset[int]
    where: str


class Symbols:
    """The symbolic numbers of one run, and what was asked of them.

    `converting`: globals of user code that asked for a value where it may call ``float`` or ``int``.
    `numbers`: the symbols, in the order of the slots. `conditions`: values that Python asked for. `riddles`: what no
    expression describes. `sized`: indices of the numbers on which torch's shape rules put a condition.
    """

    def __init__(self, env: Any, values: Sequence[Any], names: Sequence[str], which: Sequence[int]) -> None:
        self.conditions: list[Condition] = []
        self.riddles: list[Riddle] = []
        self.sized: set[int] = set()
        self.converting: dict[int, dict[str, Any]] = {}
        self.values = list(values)
        self._env = env
        self.numbers = [as_user_sees_it(_compat.new_symbol(env, values[i], f"number{i}")) for i in which]
        self._inputs = {_compat.expression_of(n): {i} for i, n in zip(which, self.numbers, strict=True)}
        self._expressions: dict[int, Expression] = {}
        self._kept: list[Any] = []  # an id is a name only while its object lives
        for i, symbol in zip(which, self.numbers, strict=True):
            self.note(symbol, number(i, names[i]))

    def note(self, symbolic: Any, expression: Expression) -> None:
        """`symbolic` is the result of `expression`."""
        node = _compat.node_of(symbolic)
        self._kept.append(node)
        self._expressions[id(node)] = expression

    def expression(self, value: Any) -> Expression | None:
        """The expression of a plain or symbolic number; None where torch made it out of sight of Python."""
        if not isinstance(value, _compat.SYMBOLIC):
            return constant(value)
        return self._expressions.get(id(_compat.node_of(value)))

    def inputs(self, symbolic: Any) -> set[int]:
        """The indices of the numbers that a symbolic number depends on."""
        known = self.expression(symbolic)
        if known is not None:
            return known.inputs()
        return self.inputs_of_algebra(_compat.expression_of(symbolic))

    def inputs_of_algebra(self, expression: Any) -> set[int]:
        """The same of a sympy expression."""
        return {i for symbol in expression.free_symbols for i in self._inputs.get(symbol, ())}

    def did(self, name: str, arguments: tuple[Any, ...], out: Any) -> None:
        """Python did the operation `name` with the result `out`."""
        nodes = [_compat.node_of(a) for a in arguments if isinstance(a, _compat.SYMBOLIC)]
        if isinstance(out, _compat.SYMBOLIC) and any(_compat.node_of(out) is node for node in nodes):
            if name == "round" and len(arguments) > 1:  # torch does not round ints to tens
                self.wonder("an int is rounded to a number of digits", self.inputs(out))
            return
        parts = [self.expression(a) if isinstance(a, _compat.SYMBOLIC) else a for a in arguments]
        if not can_apply(name) or any(part is None for part in parts):
            return
        expression = apply(name, *parts)
        try:
            value = expression(self.values)
        except (ArithmeticError, ValueError, TypeError) as error:
            self.wonder(f"Python answers {name} otherwise ({error})", expression.inputs())
            return
        hint = _compat.hint_of(out) if isinstance(out, _compat.SYMBOLIC) else out
        if not same_number(value, hint):
            self.wonder(f"torch computes {expression} as {hint!r}, Python as {value!r}", expression.inputs())
        elif not isinstance(out, _compat.SYMBOLIC) or not _compat.expression_of(out).free_symbols:
            free = any(isinstance(a, _compat.SYMBOLIC) and _compat.expression_of(a).free_symbols for a in arguments)
            if free and isinstance(value, float):
                self.wonder(f"torch takes {expression} for the same at all values", expression.inputs())
        if isinstance(out, _compat.SYMBOLIC):
            self.note(out, expression)

    def of_math(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The symbol for the result of a function, of which torch's algebra need not know anything."""
        parts = [self.expression(a) if isinstance(a, _compat.SYMBOLIC) else a for a in arguments]
        if any(part is None for part in parts):
            return NotImplemented
        expression = apply(name, *parts)
        value = expression(self.values)  # raises what Python raises: the logarithm of zero
        symbol = as_user_sees_it(_compat.new_symbol(self._env, value, f"{name}{len(self._inputs)}"))
        self._inputs[_compat.expression_of(symbol)] = expression.inputs()
        self.note(symbol, expression)
        return symbol

    def asked(self, node: Any, outcome: Any) -> None:
        """Python asked for the value of a symbolic number."""
        frame = sys._getframe(1)
        asking = innermost_user(frame)
        if asking is not None and converts(asking.f_code.co_names, asking.f_globals):
            self.converting[id(asking.f_globals)] = asking.f_globals
        expression = self._expressions.get(id(node))
        if expression is None:
            self.sized |= self.inputs_of_algebra(node._expr)
            return
        value = expression(self.values)
        if value != outcome and value != node.hint:
            self.wonder(f"torch answers {expression} with {outcome}, Python with {value!r}", expression.inputs())
        if not any(c.expression is expression for c in self.conditions):
            self.conditions.append(Condition(expression, value, line_of(asking)))

    def wonder(self, what: str, inputs: set[int]) -> None:
        """Remember something that cannot be followed."""
        self.riddles.append(Riddle(what, frozenset(inputs), line_of(innermost_user(sys._getframe(1)))))


@contextlib.contextmanager
def with_symbols(
    slots: Sequence[Slot],
    env: Any,
    which: Sequence[int] | None = None,
    converting: Sequence[dict[str, Any]] = (),
) -> Iterator[Symbols]:
    """Put symbolic numbers into `slots`, which hold plain ints and floats, while user code runs on fake tensors.

    The symbols live in `env`, the `ShapeEnv` of the fake mode. Hand ``symbols.numbers`` to `make_fx` as inputs, and
    the graph has a placeholder for each number and its arithmetic in Python's order. To the user's code and to
    libraries the numbers are instances of int and float. At the end the slots hold what they held.

    Args:
        slots: Where each number lies. Texts call it by the slot's label.
        env: the `ShapeEnv` of the fake mode in which the run takes place.
        which: indices of the slots that get a symbol; the others keep their values. All where None.
        converting: globals of user code in which ``float(n)`` and ``int(n)`` are followed.
    """
    chosen = range(len(slots)) if which is None else which
    with slots_kept(slots) as values, contextlib.ExitStack() as stack:
        symbols = Symbols(env, values, [slot.label for slot in slots], chosen)
        others = stack.enter_context(_compat.guards_seen(env, symbols.asked, _is_asked_aside))
        stack.enter_context(_operations_seen(symbols))
        followed = Followed(lambda value: type(value) in _ALL, _compat.hint_of, symbols.of_math)
        stack.enter_context(calls_are_asked(followed, converting))
        for i, symbol in zip(chosen, symbols.numbers, strict=True):
            write(slots[i], symbol)
        yield symbols
    for guard in others:
        symbols.sized |= symbols.inputs_of_algebra(guard)


@contextlib.contextmanager
def _operations_seen(symbols: Symbols) -> Iterator[None]:
    """Methods of torch's symbolic classes report to `symbols`; questions for their class, text and hash too."""
    with contextlib.ExitStack() as stack:
        for kind in _compat.SYMBOLIC:
            for attribute, method in list(vars(kind).items()):
                name = attribute.strip("_")
                if attribute in ("__bool__", "__int__", "__float__", "__index__") or not callable(method):
                    continue
                reflected = name[1:] if name[:1] == "r" and name[1:] in _REFLECTED else ""
                plain = reflected or name
                if can_apply(_RENAMED.get(plain, plain)):
                    seen = _seen(symbols, _RENAMED.get(plain, plain), bool(reflected), method)
                    stack.enter_context(_replaced(kind, attribute, seen))
            stack.enter_context(_replaced(kind, "__repr__", _text_seen(symbols, vars(kind)["__repr__"])))
            stack.enter_context(_replaced(kind, "__hash__", _hash_seen(symbols, vars(kind)["__hash__"])))
        yield


@contextlib.contextmanager
def _replaced(kind: type, attribute: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(kind).get(attribute, missing)
    setattr(kind, attribute, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(kind, attribute)
        else:
            setattr(kind, attribute, before)


def _seen(symbols: Symbols, name: str, reflected: bool, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, *others: Any) -> Any:
        out = method(self, *others)
        if isinstance(out, _compat.SYMBOLIC):
            as_user_sees_it(out)
        if out is not NotImplemented:
            arguments = (self, *(other for other in others if other is not None))
            symbols.did(name, arguments[::-1] if reflected else arguments, out)
        return out

    return operation


def _is_asked_aside() -> bool:
    return asks_aside(sys._getframe(1))


def _is_asked_by_user(frame: FrameType) -> bool:
    who = asker(frame)
    return who is not None and is_user_code(who.f_code.co_filename)


def _text_seen(symbols: Symbols, method: Callable[[Any], str]) -> Callable[[Any], str]:
    def text(self: Any) -> str:
        frame = sys._getframe(1)
        if not _is_asked_by_user(frame):
            return method(self)
        if not asks_aside(frame):
            symbols.wonder("its text is used", symbols.inputs(self))
        return repr(_compat.hint_of(self))

    return text


def _hash_seen(symbols: Symbols, method: Callable[[Any], int]) -> Callable[[Any], int]:
    def hashed(self: Any) -> int:
        if _is_asked_by_user(sys._getframe(1)):
            symbols.wonder("it is a key of a dictionary, a set or a cache", symbols.inputs(self))
            raise TypeError("a changing number is a key of a dictionary, a set or a cache")
        return method(self)

    return hashed
