"""Runs of a program on fake tensors, with plain numbers or symbols in its slots, written down operator by operator."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusion_compile._capture.numbers import _compat
from fusion_compile._capture.numbers.expressions import Expression, apply, constant
from fusion_compile._capture.numbers.positions import Indexing, Position, indexing, position
from fusion_compile._capture.numbers.symbols import Condition, Riddle, Symbols, is_plain, same_number, with_symbols
from fusion_compile._capture.python_state.slots import Slot, read, slots_kept, write
from fusion_compile._capture.python_state.whose_code import is_user_code
from fusion_compile._capture.sources.who_asks import innermost_user, line_of

RunOnFakes = Callable[[Any], object]
Log = list[tuple[Any, ...]]
"""For each operator its name and its arguments: numbers, expressions, and what tensors are."""
_OF_A_PART = ("aten.slice_backward", "aten.select_backward")
"""Their numbers are those of the forward, where indexing was written down with the numbers as they were computed."""
MOST_ENTRIES = 256
"""Constant tensors of more entries are compared by shape and dtype alone."""


@dataclass
class Run:
    """One run.

    `after`: expressions of what the slots held at the end; None for what is no plain value. `sized`: numbers on which a
    shape depends, with lines. `operands`: expressions that went into operators, with lines. `converting`: globals of
    code that asked for a value where it may call ``float`` or ``int``. `quiet`: operators are not written down now.
    `held`: conditions that nobody asked for, on positions. `stretches`: numbers that decide how long a part is.
    """

    log: Log = field(default_factory=list)
    after: list[Expression | None] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    riddles: list[Riddle] = field(default_factory=list)
    sized: dict[int, str] = field(default_factory=dict)
    operands: list[tuple[Expression, str]] = field(default_factory=list)
    error: str | None = None
    error_at: str = ""
    converting: tuple[dict[str, Any], ...] = ()
    quiet: bool = False
    held: list[Condition] = field(default_factory=list)
    stretches: set[int] = field(default_factory=set)


def run_plain(
    run_on_fakes: RunOnFakes, slots: Sequence[Slot], values: Sequence[Any], restore: Callable[[], None]
) -> Run:
    """Run with plain `values` in the slots.

    Raises:
        Exception: the program's own, if the slots hold these values already. With other values it is kept in `error`.
    """
    run = Run()
    with slots_kept(slots) as own:
        for slot, value in zip(slots, values, strict=True):
            write(slot, value)
        try:
            with _IndexingSeen(run, None):
                run_on_fakes(_compat.SeenFakeMode(lambda *call: _see(run, None, *call)))
            run.after = [_left_in(slot, None) for slot in slots]
        except Exception as error:
            if all(map(same_number, own, values)):
                raise
            run.error = _described(error)
        finally:
            restore()
    return run


def run_symbolic(
    run_on_fakes: RunOnFakes,
    slots: Sequence[Slot],
    which: Sequence[int],
    restore: Callable[[], None],
    converting: Sequence[dict[str, Any]] = (),
) -> Run:
    """Run with symbols in the slots with the indices `which`. An error of the program is kept in `error`.

    `converting`: globals of user code in which ``float(n)`` and ``int(n)`` are followed.
    """
    run = Run()
    mode = _compat.SeenFakeMode(lambda *call: _see(run, symbols, *call))
    with with_symbols(slots, mode.shape_env, which, converting) as symbols:
        try:
            with _IndexingSeen(run, symbols):
                run_on_fakes(mode)
            run.after = [_left_in(slot, symbols) for slot in slots]
        except Exception as error:
            run.error = _described(error)
            frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_code(f.filename)]
            run.error_at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        finally:
            restore()
    run.conditions, run.riddles = [*symbols.conditions, *run.held], symbols.riddles
    run.converting = tuple(symbols.converting.values())
    run.sized |= {i: run.sized.get(i, "") for i in symbols.sized}
    return run


def _left_in(slot: Slot, symbols: Symbols | None) -> Expression | None:
    """What a run left in a slot; None for a tensor, an object, or nothing at all."""
    value = read(slot)
    if symbols is not None and isinstance(value, _compat.SYMBOLIC):
        return symbols.expression(value)
    return constant(value) if is_plain(value) else None


def same_log(log: Log, other: Log, values: Sequence[Any]) -> bool:
    """Whether two runs called the same operators with the same arguments, expressions having these `values`."""
    return len(log) == len(other) and all(
        len(a) == len(b) and all(_same(x, y, values) for x, y in zip(a, b, strict=True))
        for a, b in zip(log, other, strict=True)
    )


def _same(a: Any, b: Any, values: Sequence[Any]) -> bool:
    try:
        a, b = (x(values) if isinstance(x, Expression) else x for x in (a, b))
    except (ArithmeticError, ValueError, TypeError):
        return False
    return same_number(a, b)


def _see(run: Run, symbols: Symbols | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if run.quiet:
        return
    run.log.append(_entry(symbols, func, args, kwargs))
    if symbols is None:
        return
    where = None
    for _, kind, value in _compat.given(func, args, kwargs):
        for leaf in _compat.leaves(value):
            if not isinstance(leaf, _compat.SYMBOLIC):
                continue
            where = where if where is not None else line_of(innermost_user(sys._getframe(1)))
            expression = symbols.expression(leaf)
            if expression is None or "int" in kind.lower():
                run.sized |= {i: run.sized.get(i, where) for i in symbols.inputs(leaf)}
            else:
                run.operands.append((expression, where))
    for leaf in _compat.leaves(out):
        if isinstance(leaf, Tensor):
            for size in (s for s in leaf.shape if isinstance(s, _compat.SYMBOLIC)):
                where = where if where is not None else line_of(innermost_user(sys._getframe(1)))
                run.sized |= {i: run.sized.get(i, where) for i in symbols.inputs(size)}


def _entry(symbols: Symbols | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    given = [leaf for _, _, value in _compat.given(func, args, kwargs) for leaf in _compat.leaves(value)]
    if str(func).startswith(_OF_A_PART):
        given = [leaf for leaf in given if isinstance(leaf, Tensor)]
    return (str(func), *(_form(symbols, leaf) for leaf in given))


def _form(symbols: Symbols | None, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        shape = [_compat.hint_of(s) if isinstance(s, _compat.SYMBOLIC) else s for s in leaf.shape]
        small = _compat.has_data(leaf) and leaf.numel() <= MOST_ENTRIES
        return f"{leaf.dtype} {shape} {leaf.device} {leaf.detach().tolist() if small else ''}"
    if isinstance(leaf, _compat.SYMBOLIC):
        return (symbols.expression(leaf) if symbols is not None else None) or _compat.hint_of(leaf)
    return leaf if type(leaf) in (int, float, bool, str) else repr(leaf)


class _IndexingSeen(TorchFunctionMode):
    """Writes indexing down as a whole, with its numbers, and not the operators that it consists of."""

    def __init__(self, run: Run, symbols: Symbols | None) -> None:
        super().__init__()
        self._run, self._symbols = run, symbols

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = indexing(func, args, kwargs or {}, _is_symbolic)
        if call is None:
            return func(*args, **(kwargs or {}))
        leaves = [call.tensor, *call.numbers(), *call.values]
        # Of tensors no entries: the fake mode is on, in which none can be read.
        forms = [f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else _form(self._symbols, t) for t in leaves]
        self._run.log.append((func.__name__, *forms))
        if self._symbols is not None and any(map(_is_symbolic, leaves)):
            _learn(self._run, self._symbols, call)
        with _quietly(self._run):
            return call.map(_hint).do()


def _learn(run: Run, symbols: Symbols, call: Indexing) -> None:
    """What must hold so that `call` is the same at another position, and what stands for the position."""
    where = line_of(innermost_user(sys._getframe(2)))
    found = position(call, _is_symbolic, _hint) if any(map(_is_symbolic, call.numbers())) else None
    for value in filter(_is_symbolic, call.values):
        expression = symbols.expression(value)
        if expression is None:
            run.sized |= {i: run.sized.get(i, where) for i in symbols.inputs(value)}
        else:
            run.operands.append((expression, where))
    conditions = None if found is None else _conditions(symbols, found, where)
    if conditions is None:
        inputs = {i for n in call.numbers() if _is_symbolic(n) for i in symbols.inputs(n)}
        run.sized |= {i: run.sized.get(i, where) for i in inputs}
        return
    assert found is not None
    start = symbols.expression(found.start)
    if start is not None and start.inputs():
        run.operands.append((start, where))
    length = 0 if found.stop is None else _algebra(found.stop) - _algebra(found.start)
    run.stretches |= set() if isinstance(length, int) else symbols.inputs_of_algebra(length)
    run.held += [c for c in conditions if c.expression.inputs()]


def _conditions(symbols: Symbols, found: Position, where: str) -> list[Condition] | None:
    """That the position lies inside and the length stays; None where it does not now."""
    start = symbols.expression(found.start)
    stop = start if found.stop is None else symbols.expression(found.stop)
    if start is None or stop is None:
        return None
    conditions: list[Condition] = []
    if found.stop is not None:
        conditions.append(Condition(apply("sub", stop, start), _hint(found.stop) - _hint(found.start), where))
    if found.beyond is not None:
        behind = symbols.expression(found.beyond)
        if behind is None:
            return None
        conditions.append(Condition(apply("ge", behind, found.size), True, where))
    if found.size is not None:
        last = "lt" if found.stop is None else "le"
        conditions += [
            Condition(apply("ge", start, 0), True, where),
            Condition(apply(last, stop, found.size), True, where),
        ]
    return conditions if all(c.holds(symbols.values) for c in conditions) else None


@contextlib.contextmanager
def _quietly(run: Run) -> Iterator[None]:
    was, run.quiet = run.quiet, True
    try:
        yield
    finally:
        run.quiet = was


def _is_symbolic(value: Any) -> bool:
    return type(value) not in _PLAIN and isinstance(value, _compat.SYMBOLIC)


_PLAIN = frozenset((int, float, bool, type(None), slice))


def _algebra(value: Any) -> Any:
    return _compat.expression_of(value) if _is_symbolic(value) else value


def _hint(value: Any) -> Any:
    return _compat.hint_of(value) if _is_symbolic(value) else value


def _described(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
