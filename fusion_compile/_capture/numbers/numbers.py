"""What a plain number that changes at every run decides, and how it goes on.

A counter, an annealed temperature or a pointer into a queue stands as a symbol during one run on fake tensors. What the
program asks of it says until when a captured graph is right, and what the program leaves in the slot says how the host
counts on without running Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusion_compile._capture.numbers import _compat
from fusion_compile._capture.numbers.expressions import Expression, number
from fusion_compile._capture.numbers.number_runs import Log, Run, run_plain, run_symbolic, same_log
from fusion_compile._capture.numbers.symbols import Condition, is_plain, same_number
from fusion_compile._capture.python_state.slots import Slot, read

Decides = Literal["nothing", "until", "operand", "size", "unsupported"]

LARGEST = 2**62
"""Ints from here on do not fit into the program's numbers, and stand as they are."""
CHECKED_STEPS = (1, 2, 3, 10)
"""The rule is compared with runs on the plain numbers after so many steps."""


@dataclass(frozen=True)
class NumberUse:
    """What one number decides.

    `decides`:

    - ``"nothing"``: no condition, no operator; it is counted on.
    - ``"until"``: the captured step holds while `conditions` hold.
    - ``"operand"``: it is used in arithmetic on tensors and becomes a 0-dim input; conditions may hold for it too.
    - ``"size"``: it decides a shape, a position, or how an operator computes.
    - ``"unsupported"``: the program asks something of it that no expression describes.

    A program with a number of the last two kinds is right for this one value, and `conditions` says so.

    `operands`: the expressions of the numbers that go into operators. `where`: ``"file:line"`` of the first thing that
    the program asked, or ``""``. `why`: for ``"unsupported"``, what was asked.
    """

    label: str
    value: Any
    decides: Decides
    conditions: tuple[Condition, ...] = ()
    operands: tuple[Expression, ...] = ()
    where: str = ""
    why: str = ""

    def sentence(self) -> str:
        """One sentence for people."""
        at = f" ({self.where})" if self.where else ""
        name = f"{self.label} ({self.value!r})"
        while_ = " and ".join(f"`{condition}`" for condition in self.conditions)
        if self.decides == "nothing":
            return f"{name} decides nothing in the step and is counted on."
        if self.decides == "operand":
            holds = f" The captured step holds while {while_}." if while_ else ""
            return f"{name} is used in arithmetic on tensors{at} and is an input of the step.{holds}"
        if self.decides == "until":
            return f"{name} decides how the step goes on{at}; the captured step holds while {while_}."
        if self.decides == "size":
            return (
                f"{name} decides a shape, a position or how an operator computes{at}; the captured step holds for this "
                f"value alone, and it has too many. Keep it in a 0-dim tensor and use torch.where, torch.gather or "
                f"index_copy; mode='eager' runs it as it is."
            )
        return (
            f"{name} changes at each step, and {self.why}{at}; the captured step holds for this value alone. "
            f"Keep it in a 0-dim tensor, or change it outside of the step; mode='eager' runs it as it is."
        )


@dataclass(frozen=True)
class NumberRule:
    """When a captured step is right, and the numbers after it; both on the host, without running the user's Python.

    Values are tuples in the order of the slots. `pinned`: indices of the numbers for whose one value the step
    was captured.
    """

    conditions: tuple[Condition, ...]
    after: tuple[Expression, ...]
    kinds: tuple[type, ...]
    pinned: tuple[int, ...] = ()

    def holds(self, values: Sequence[Any]) -> bool:
        """Whether the step that was captured is the step for these numbers."""
        return self.failed(values) is None

    def failed(self, values: Sequence[Any]) -> Condition | None:
        """The first condition that these numbers do not fulfil."""
        for i, (value, kind) in enumerate(zip(values, self.kinds, strict=True)):
            may_be_symbol = kind not in (int, float) or i in self.pinned or _is_symbol_worthy(value)
            if type(value) is not kind or not may_be_symbol:
                return Condition(number(i, f"the type of number {i}"), kind.__name__, "")
        return next((condition for condition in self.conditions if not condition.holds(values)), None)

    def next(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The numbers after a step that began with these.

        Raises:
            ArithmeticError, ValueError: the program's own arithmetic fails for these numbers.
        """
        return tuple(expression(values) for expression in self.after)


@dataclass(frozen=True)
class Numbers:
    """`uses`: one for each slot. `rule`: None where a slot holds, or comes to hold, a tensor or another object.
    `converting`: globals of user code in which ``float(n)`` and ``int(n)`` are followed. `stretches`: indices of
    numbers that decide how long a part of a tensor is, and hold while it stays so long."""

    uses: tuple[NumberUse, ...]
    rule: NumberRule | None
    converting: tuple[dict[str, Any], ...] = ()
    stretches: tuple[int, ...] = ()


def study_numbers(
    run_on_fakes: Callable[[Any], object],
    slots: Sequence[Slot],
    *,
    restore: Callable[[], None] = lambda: None,
    steps: Sequence[int] = CHECKED_STEPS,
) -> Numbers:
    """Find out what changing numbers decide.

    The program runs on fake tensors once with the plain numbers and once with symbols. Both runs must call the same
    operators and leave the same numbers. The rule is then compared with runs on the plain numbers that it predicts for
    later `steps`. A number that cannot be followed, or on which a shape depends, keeps its value, and the rest is
    studied again: ``2 + len(steps)`` runs, and at most ``len(steps) + 1`` more for each number that is given up.

    Cost: six runs by default, 2.4 CPU seconds for a DiT of 12 blocks.

    What cannot be seen: ``type(n) is int`` (`isinstance` is answered as for plain numbers) together with a value that
    none of `steps` reaches; ``n is 1``; numbers that change without being in `slots`. A bool keeps its value: a step
    that switches between two has two programs.

    Args:
        run_on_fakes: runs forward and backward inside the fake mode that it is given. What it returns is not used.
        slots: Where every plain value lies that changes at a run. The slots hold what they held when this returns or
            raises.
        restore: called after each run, when the slots were read; puts back what else the run changed.
        steps: after how many steps the rule is compared with a run on plain numbers.

    Raises:
        Exception: the program itself fails on fake tensors with its own numbers.
    """
    labels = [slot.label for slot in slots]
    values = [read(slot) for slot in slots]
    study = _Study(labels, values)
    if why := _compat.why_numbers_cannot_be_followed():
        study.pin(study.symbolic, "unsupported", why, "")
        return Numbers(tuple(study.use(i, None) for i in range(len(values))), None)
    if any(not is_plain(value) for value in values):
        return Numbers(tuple(study.use(i, None) for i in range(len(values))), None)
    truth = run_plain(run_on_fakes, slots, values, restore)
    converting: tuple[dict[str, Any], ...] | None = None
    while True:
        run = run_symbolic(run_on_fakes, slots, study.symbolic, restore, converting or ())
        if converting is None and run.converting and study.symbolic:
            trial = run_symbolic(run_on_fakes, slots, study.symbolic, restore, run.converting)
            follows = trial.error is None and same_log(trial.log, truth.log, values)
            run, converting = (trial, run.converting) if follows else (run, ())
        if study.learn(run, truth):
            continue
        if any(expression is None for expression in run.after):
            return Numbers(tuple(study.use(i, run) for i in range(len(values))), None)
        rule = study.rule(run)
        wrong = _disproved(rule, run.log, lambda v: run_plain(run_on_fakes, slots, v, restore), values, steps)
        if wrong and study.symbolic:
            study.pin(study.symbolic, "unsupported", wrong, "")
            continue
        return Numbers(
            tuple(study.use(i, run) for i in range(len(values))), rule, converting or (), tuple(run.stretches)
        )


class _Study:
    """Which numbers still stand as symbols, and why the others do not."""

    def __init__(self, labels: Sequence[str], values: Sequence[Any]) -> None:
        self._labels, self._values = labels, values
        self.symbolic = [i for i, v in enumerate(values) if type(v) in (int, float) and _is_symbol_worthy(v)]
        self._pinned: dict[int, tuple[Decides, str, str]] = {}
        for i, value in enumerate(values):
            if i not in self.symbolic:
                kind: Decides = "until" if type(value) is bool else "unsupported"
                why = "it is too large" if type(value) in (int, float) else "it is no number"
                self._pinned[i] = (kind, f"{why} ({type(value).__name__})", "")

    def pin(self, which: Sequence[int], decides: Decides, why: str, where: str) -> None:
        """These numbers keep their values from now on."""
        for i in which:
            self._pinned.setdefault(i, (decides, why, where))
        self.symbolic = [i for i in self.symbolic if i not in self._pinned]

    def learn(self, run: Run, truth: Run) -> bool:
        """Pin what cannot be followed; whether anything was."""
        before = len(self.symbolic)
        for riddle in run.riddles:
            self.pin(sorted(riddle.inputs), "unsupported", riddle.what, riddle.where)
        for i, where in run.sized.items():
            self.pin([i], "size", "", where)
        if len(self.symbolic) == before and self.symbolic:
            if run.error is not None:
                self.pin(self.symbolic, "unsupported", f"as a symbol it fails ({run.error})", run.error_at)
            elif not same_log(run.log, truth.log, self._values):
                self.pin(self.symbolic, "unsupported", "the program does otherwise with a symbol in its place", "")
            else:
                for i, expression in enumerate(run.after):
                    if expression is None or not _is_right(expression, self._values, truth.after[i]):
                        self.pin(self.symbolic, "unsupported", f"how {self._labels[i]} goes on cannot be followed", "")
        return len(self.symbolic) < before

    def rule(self, run: Run) -> NumberRule:
        """The rule of a run that was followed."""
        fixed = [Condition(number(i, self._labels[i]), self._values[i], "") for i in sorted(self._pinned)]
        after = tuple(e for e in run.after if e is not None)
        kinds = tuple(type(v) for v in self._values)
        return NumberRule((*fixed, *run.conditions), after, kinds, tuple(sorted(self._pinned)))

    def use(self, i: int, run: Run | None) -> NumberUse:
        """What number `i` decides."""
        label, value = self._labels[i], self._values[i]
        fixed = (Condition(number(i, label), value, ""),)
        if i in self._pinned:
            decides, why, where = self._pinned[i]
            return NumberUse(label, value, decides, fixed, (), where, why)
        if run is None:
            return NumberUse(label, value, "unsupported", fixed, (), "", "another value that changes is no plain one")
        conditions = tuple(c for c in run.conditions if i in c.expression.inputs())
        operands = [(e, where) for e, where in run.operands if i in e.inputs()]
        places = [where for _, where in operands] + [c.where for c in conditions]
        decides = "operand" if operands else "until" if conditions else "nothing"
        return NumberUse(
            label, value, decides, conditions, tuple(e for e, _ in operands), next(filter(None, places), "")
        )


def _disproved(
    rule: NumberRule, log: Log, run: Callable[[Sequence[Any]], Run], values: Sequence[Any], steps: Sequence[int]
) -> str:
    """What a run on later plain numbers did against the rule; "" where the rule stands."""
    now: tuple[Any, ...] = tuple(values)
    for step in range(1, max(steps, default=0) + 1):
        try:
            now = rule.next(now)
        except (ArithmeticError, ValueError, TypeError):
            return ""
        if not rule.holds(now):
            return ""
        if step in steps:
            seen = run(now)
            if seen.error is not None or not same_log(log, seen.log, now):
                return f"the program does otherwise after {step} steps without having asked"
            if not all(_is_right(e, now, v) for e, v in zip(rule.after, seen.after, strict=True)):
                return f"it goes on otherwise after {step} steps without having asked"
    return ""


def _is_right(expression: Expression, values: Sequence[Any], found: Any) -> bool:
    try:
        return same_number(expression(values), found(values) if isinstance(found, Expression) else found)
    except (ArithmeticError, ValueError, TypeError):
        return False


def _is_symbol_worthy(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else -LARGEST < value < LARGEST
