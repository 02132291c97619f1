"""Plain numbers that a loss changes at every forward: when a captured step is right for them, and counting on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fusion_compile._capture.numbers.numbers import NumberRule, study_numbers
from fusion_compile._capture.python_state.slots import Slot, read, write

_FOLLOWED = ("nothing", "until")


class CountedNumbers:
    """The numbers of one captured step.

    Args:
        slots: Where they lie.
        rule: While it holds, the captured step is the step, and it says how the numbers go on.
    """

    def __init__(self, slots: Sequence[Slot], rule: NumberRule) -> None:
        self.slots, self._rule = list(slots), rule

    def fit(self) -> bool:
        """Whether the captured step is the step for the numbers as they are now."""
        return self._rule.holds([read(slot) for slot in self.slots])

    def count_on(self) -> None:
        """What a step does to the numbers, without running the user's Python."""
        for slot, value in zip(self.slots, self._rule.next([read(slot) for slot in self.slots]), strict=True):
            write(slot, value)


def count_numbers(
    slots: Sequence[Slot], run_on_fakes: Callable[[Any], object], restore: Callable[[], None]
) -> CountedNumbers:
    """Find out what numbers decide.

    `run_on_fakes`: runs forward and backward of the loss inside the fake mode that it is given; `restore` puts back
    what it leaves behind, the numbers apart. Raises ValueError for a number that a captured step cannot follow.
    """
    numbers = study_numbers(run_on_fakes, slots, restore=restore)
    for use in numbers.uses:
        if use.decides == "operand":
            where = f" ({use.where})" if use.where else ""
            raise ValueError(
                f"{use.label} ({use.value!r}) changes at each step and is used in arithmetic on tensors{where}; a "
                f"program has it as it was. Keep it in a 0-dim tensor (a buffer counts with tensor.add_(1))."
            )
        if numbers.rule is None or use.decides not in _FOLLOWED:
            raise ValueError(use.sentence())
    assert numbers.rule is not None
    return CountedNumbers(slots, numbers.rule)
