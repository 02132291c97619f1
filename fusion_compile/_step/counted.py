"""Plain numbers that a loss changes at every forward: when a captured step is right for them, and counting on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusion_compile._capture.numbers.numbers import NumberRule, study_numbers
from fusion_compile._capture.python_state.slots import Slot, read, write
from fusion_compile._step.operands import Operands

_FOLLOWED = ("nothing", "until", "operand")


class CountedNumbers:
    """The numbers of one captured step.

    Args:
        slots: Where they lie.
        rule: While it holds, the captured step is the step, and it says how the numbers go on.
        operands: What goes into arithmetic on tensors; None if nothing does.
    """

    def __init__(self, slots: Sequence[Slot], rule: NumberRule, operands: Operands | None = None) -> None:
        self.slots, self._rule, self.operands = list(slots), rule, operands

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
        return self._rule.holds([read(slot) for slot in self.slots])

    def count_on(self) -> None:
        """What a step does to the numbers, without running the user's Python."""
        for slot, value in zip(self.slots, self._rule.next([read(slot) for slot in self.slots]), strict=True):
            write(slot, value)


def count_numbers(
    slots: Sequence[Slot],
    run_on_fakes: Callable[[Any], object],
    restore: Callable[[], None],
    device: torch.device,
) -> CountedNumbers:
    """Find out what numbers decide.

    `run_on_fakes`: runs forward and backward of the loss inside the fake mode that it is given; `restore` puts back
    what it leaves behind, the numbers apart. `device`: where operands lie. Raises ValueError for a number that a
    captured step cannot follow.
    """
    if not slots:
        return CountedNumbers((), NumberRule((), (), ()))
    numbers = study_numbers(run_on_fakes, slots, restore=restore)
    for use in numbers.uses:
        if numbers.rule is None or use.decides not in _FOLLOWED:
            raise ValueError(use.sentence())
    assert numbers.rule is not None
    used = [expression for use in numbers.uses for expression in use.operands]
    return CountedNumbers(slots, numbers.rule, Operands(slots, used, device) if used else None)


def operand_sentence(numbers: CountedNumbers, why: str) -> str:
    """The refusal of numbers for which no input can stand."""
    names = ", ".join(f"{slot.label} ({read(slot)!r})" for slot in numbers.slots)
    return (
        f"{names}: changes at each step and is used in arithmetic on tensors, but {why}. Keep it in a 0-dim tensor (a "
        f"buffer counts with tensor.add_(1))."
    )
