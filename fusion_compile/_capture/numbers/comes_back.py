"""Whether plain numbers for whose values a program is made come back to values that they had: a pointer into a short
queue, a phase that alternates, a warm-up that ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from fusion_compile._capture.numbers.number_runs import Run, run_plain
from fusion_compile._capture.numbers.symbols import is_plain, same_number
from fusion_compile._capture.python_state.slots import Slot, read


def come_back(
    run_on_fakes: Callable[[Any], object],
    slots: Sequence[Slot],
    which: Collection[int],
    restore: Callable[[], None],
    at_most: int,
) -> bool:
    """Whether the numbers with the indices `which` have at most so many values together, one after the other.

    The program runs on fake tensors with the numbers that it left, until those in `which` are what they were before.
    What was no number (None) and becomes one is followed from then on, and counts as one value.

    `restore`: called after each run; puts back what else it changed. The slots hold what they held at the end.
    """
    begun = [read(slot) for slot in slots]
    numbers = [i for i in which if type(begun[i]) in (int, float)]
    seen: list[list[Any]] = []
    for now, _ in _runs(run_on_fakes, slots, restore, at_most + 1):
        key = [now[i] for i in which if i in numbers or type(now[i]) not in (int, float)]
        if any(len(key) == len(old) and all(map(same_number, key, old)) for old in seen):
            return True
        seen.append(key)
    return False


def computes_otherwise_each_time(
    run_on_fakes: Callable[[Any], object], slots: Sequence[Slot], restore: Callable[[], None], at_most: int
) -> bool:
    """Whether more than so many runs, one after the other, all compute something else, positions apart."""
    logs = []
    for _, run in _runs(run_on_fakes, slots, restore, at_most + 1):
        log = [entry for entry in run.log if "." in entry[0]]
        if log in logs:
            return False
        logs.append(log)
    return len(logs) > at_most


def _runs(
    run_on_fakes: Callable[[Any], object], slots: Sequence[Slot], restore: Callable[[], None], count: int
) -> Iterator[tuple[list[Any], Run]]:
    """So many runs with the numbers that the last one left, and the numbers with which each began; fewer where one
    fails, or leaves something that is no plain value."""
    now: list[Any] = [read(slot) for slot in slots]
    for _ in range(count):
        try:
            run = run_plain(run_on_fakes, slots, now, restore)
        except Exception:  # of any kind: what fails on fake tensors is told where it is captured
            return
        left = [e if e is None else (e(now),) for e in run.after]
        if run.error is not None or any(one is None or not is_plain(one[0]) for one in left):
            return
        yield now, run
        now = [one[0] for one in left if one is not None]
