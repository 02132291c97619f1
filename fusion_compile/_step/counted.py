"""Plain numbers that a loss changes at every forward: when a captured step is right for them, and counting on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fusion_compile._capture.numbers.comes_back import come_back, computes_otherwise_each_time
from fusion_compile._capture.numbers.numbers import NumberRule, study_numbers
from fusion_compile._capture.python_state.slots import Slot, read, write
from fusion_compile._step.operands import Operands
from fusion_compile._step.shapes import MAX_PROGRAMS

_FOLLOWED = ("nothing", "until", "operand")


class CountedNumbers:
    """The numbers of one captured step.

    Args:
        slots: Where they lie.
        rule: While it holds, the captured step is the step, and it says how the numbers go on.
        operands: What goes into arithmetic on tensors; None if nothing does.
        of_the_batch: How many of `slots`, the last ones, hold numbers of the batch, which the step does not count on.
        fixed: Where numbers of the batch lie for whose present values alone the captured step is the step.

    Attributes:
        counted: Where the numbers lie that the step counts on.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        rule: NumberRule,
        operands: Operands | None = None,
        *,
        of_the_batch: int = 0,
        fixed: Sequence[Slot] = (),
    ) -> None:
        self.slots, self._rule, self.operands = list(slots), rule, operands
        self.counted = self.slots[: len(self.slots) - of_the_batch]
        self._fixed = [(slot, read(slot)) for slot in fixed]

    def given(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a captured step takes: `batch`, and behind it the operands for the numbers as they are now."""
        return batch if self.operands is None else (*batch, self.operands.inputs())

    def followed(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        """`advance` (of the state and what is `given`) to be captured, with the operands as tensors in it."""
        operands = self.operands
        if operands is None:
            return advance

        def with_operands(state: Any, given: tuple[Any, ...]) -> Any:
            with operands.standing_in(given[-1]):
                return advance(state, given[:-1])

        return with_operands

    def fit(self) -> bool:
        """Whether the captured step is the step for the numbers as they are now."""
        if not (self.slots or self._fixed):
            return True
        return all(_is_same(read(slot), value) for slot, value in self._fixed) and self._rule.holds(
            [read(slot) for slot in self.slots]
        )

    def count_on(self) -> None:
        """What a step does to the numbers, without running the user's Python."""
        if not self.counted:
            return
        for slot, value in zip(self.counted, self._rule.next([read(slot) for slot in self.slots]), strict=False):
            write(slot, value)


def count_numbers(
    slots: Sequence[Slot],
    run_on_fakes: Callable[[Any], object],
    restore: Callable[[], None],
    device: torch.device,
    given: Sequence[Slot] = (),
) -> CountedNumbers:
    """Find out what numbers decide: those in `slots`, which the loss changes, and in `given`, which a batch brings.

    `run_on_fakes`: runs forward and backward of the loss inside the fake mode that it is given; `restore` puts back
    what it leaves behind, the numbers apart. `device`: where operands lie. A captured step is the step for one value of
    a number that it cannot follow. Raises ValueError for such a number if the loss changes it and it has more than
    `MAX_PROGRAMS` values.
    """
    every = [*slots, *given]
    if not every:
        return CountedNumbers((), NumberRule((), (), ()))
    numbers = study_numbers(run_on_fakes, every, restore=restore)
    own = numbers.uses[: len(slots)]
    fixed = [i for i, use in enumerate(own) if use.decides not in _FOLLOWED]
    if own and numbers.rule is None:
        raise ValueError(next((own[i] for i in fixed), own[0]).sentence())
    if fixed and not come_back(run_on_fakes, every, fixed, restore, MAX_PROGRAMS):
        raise ValueError(own[fixed[0]].sentence())
    long = [i for i in numbers.stretches if i < len(own)]
    if long and computes_otherwise_each_time(run_on_fakes, every, restore, MAX_PROGRAMS):
        raise ValueError(replace(own[long[0]], decides="size").sentence())
    if numbers.rule is None:
        return fixed_numbers(given)
    used = [expression for use in numbers.uses for expression in use.operands if use.decides in _FOLLOWED]
    operands = Operands(every, used, device, numbers.converting) if used else None
    return CountedNumbers(every, numbers.rule, operands, of_the_batch=len(given))


def fixed_numbers(given: Sequence[Slot]) -> CountedNumbers:
    """The numbers of a step that is the step for the present values alone of those that its batch brings."""
    return CountedNumbers((), NumberRule((), (), ()), fixed=given)


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and repr(one) == repr(other)


def operand_sentence(numbers: CountedNumbers, why: str) -> str:
    """The refusal of numbers for which no input can stand."""
    names = ", ".join(f"{slot.label} ({read(slot)!r})" for slot in numbers.slots)
    return (
        f"{names}: changes at each step and is used in arithmetic on tensors, but {why}. Keep it in a 0-dim tensor (a "
        f"buffer counts with tensor.add_(1)), or take mode='eager'."
    )
