"""Runs of a program on fake tensors, with plain numbers or symbols in its slots, written down operator by operator."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fusion_compile._capture.numbers import _compat
from fusion_compile._capture.numbers.expressions import Expression, constant
from fusion_compile._capture.numbers.symbols import Condition, Riddle, Symbols, is_plain, same_number, with_symbols
from fusion_compile._capture.python_state.slots import Slot, read, slots_kept, write
from fusion_compile._capture.python_state.whose_code import is_user_code
from fusion_compile._capture.sources.who_asks import innermost_user, line_of

RunOnFakes = Callable[[Any], object]
Log = list[tuple[Any, ...]]
"""For each operator its name and its arguments: numbers, expressions, and what tensors are."""
MOST_ENTRIES = 256
"""Constant tensors of more entries are compared by shape and dtype alone."""


@dataclass
class Run:
    """One run.

    `after`: expressions of what the slots held at the end; None for what is no plain value. `sized`: numbers on which a
    shape depends, with lines. `operands`: expressions that went into operators, with lines. `converting`: globals of
    code that asked for a value where it may call ``float`` or ``int``.
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
            run_on_fakes(_compat.SeenFakeMode(lambda *call: run.log.append(_entry(None, *call[:3]))))
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
            run_on_fakes(mode)
            run.after = [_left_in(slot, symbols) for slot in slots]
        except Exception as error:
            run.error = _described(error)
            frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_code(f.filename)]
            run.error_at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        finally:
            restore()
    run.conditions, run.riddles = symbols.conditions, symbols.riddles
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


def _see(run: Run, symbols: Symbols, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    run.log.append(_entry(symbols, func, args, kwargs))
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
    return (str(func), *(_form(symbols, leaf) for leaf in given))


def _form(symbols: Symbols | None, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        shape = [_compat.hint_of(s) if isinstance(s, _compat.SYMBOLIC) else s for s in leaf.shape]
        small = _compat.has_data(leaf) and leaf.numel() <= MOST_ENTRIES
        return f"{leaf.dtype} {shape} {leaf.device} {leaf.detach().tolist() if small else ''}"
    if isinstance(leaf, _compat.SYMBOLIC):
        return (symbols.expression(leaf) if symbols is not None else None) or _compat.hint_of(leaf)
    return leaf if type(leaf) in (int, float, bool, str) else repr(leaf)


def _described(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
