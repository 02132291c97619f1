"""The highest point of memory of a compiled program, from what the compiler wrote, before anything runs.

Inductor decides in which order kernels run, which results lie in the memory of others, and where memory is given back.
All of that stands in the Python function that it writes around its kernels. Run on tensors without data, without the
kernels, that function allocates what it allocates in training, at no cost of time or memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from fusion_compile._program.memory._compat import Written, allocations_of


@dataclass(frozen=True)
class AliveThen:
    """Memory at the highest point. `name`: of the kernel that writes it first. `shape`, `dtype`: as it is allocated."""

    name: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Peak:
    """The highest point of one run of a program.

    Attributes:
        bytes: Allocated then, beyond the program's inputs.
        kernel: The last one that was started before.
        alive: What was allocated then, the largest first.
    """

    bytes: int
    kernel: str
    alive: tuple[AliveThen, ...]


@dataclass
class Schedule:
    """What was written for one captured graph: one program, or none where the compiler is not Inductor or is told to
    compile it in several parts."""

    written: list[Written] = field(default_factory=list)
    _peak: Peak | None = None

    def forget(self) -> None:
        """The graph is compiled anew."""
        self.written.clear()
        self._peak = None

    def peak(self) -> Peak | None:
        """The predicted highest point; None where it is not known. Runs no kernel and allocates nothing."""
        if self._peak is None and len(self.written) == 1:
            self._peak = highest(self.written[0])
        return self._peak


_SCHEDULE: ContextVar[Schedule | None] = ContextVar("schedule", default=None)


@contextlib.contextmanager
def written_into(schedule: Schedule) -> Iterator[None]:
    """Inside, what a compiler writes for a program is noted in `schedule`."""
    before = _SCHEDULE.set(schedule)
    try:
        yield
    finally:
        _SCHEDULE.reset(before)


def note(written: Written) -> None:
    """A compiler has written this."""
    if (schedule := _SCHEDULE.get()) is not None:
        schedule.written.append(written)


def highest(written: Written) -> Peak:
    """Where a run of `written` has most memory."""
    lines, moments = written.source.splitlines(), allocations_of(written)
    most = max(moments, key=lambda alive: sum(one.bytes for one in alive), default=())
    last = max((one.line for one in most), default=0)
    alive = [
        AliveThen(_writer(lines, one.line), one.bytes, one.shape, str(one.dtype).removeprefix("torch."))
        for one in sorted(most, key=lambda one: -one.bytes)
    ]
    return Peak(sum(one.bytes for one in most), _writer(lines, last), tuple(alive))


_CALL = re.compile(r"^\s*(?:[\w, ]+ = )?([\w.]+)\(")
_NO_WRITERS = ("reinterpret_tensor", "assert_size_stride", "assert_alignment")
_ALLOCATES = re.compile(r"^\s*(\w+) = empty_strided")


def _writer(lines: Sequence[str], at: int) -> str:
    """What the function calls at a line; where that only allocates, what it calls first with the new memory."""
    if not 0 < at <= len(lines):
        return ""
    if (made := _ALLOCATES.match(lines[at - 1])) is None:
        found = _CALL.match(lines[at - 1])
        return found[1] if found else ""
    name = re.compile(rf"\b{made[1]}\b")
    for line in lines[at:]:
        found = _CALL.match(line) if name.search(line) else None
        if found and found[1] not in _NO_WRITERS:
            return found[1]
    return ""
