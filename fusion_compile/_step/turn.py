"""A step's state is written and read by one thread at a time, and as a whole.

Ctrl-C in the middle of a compiled step would leave some banks written and others not. So signals whose handlers are
Python functions wait until the step is over; a second one does not wait. What ends a step in the middle all the same
(that second one, an exception that another thread raises in this one) leaves a mark, and a marked state is neither
saved nor stepped on.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Concatenate, ParamSpec, TypeVar

from fusion_compile._state import keys
from fusion_compile._types import Tensors

try:  # without the conversions to enumerations that `signal` makes, which cost a step some 15 µs
    import _signal as handlers  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # another Python than CPython
    import signal as handlers

_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP")
_NUMBERS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals for which people write handlers in Python, which may raise."""

Owner = TypeVar("Owner")
Given = ParamSpec("Given")
Result = TypeVar("Result")


class Turn:
    """A lock between threads (``with turn:``), and the count of writes that began and ended (``with turn.writing():``).

    `state`: the flat state that is written.
    """

    def __init__(self, state: Callable[[], Tensors]) -> None:
        self._state = state
        self._lock = threading.RLock()
        self._begun = self._ended = 0

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def check(self) -> None:
        """Raise RuntimeError if a write did not come to its end."""
        if self._begun != self._ended:
            raise RuntimeError(
                "a step was interrupted while it wrote its state: some weights are after it, and others before. Load "
                "a checkpoint (step.load, step.load_state_dict) to go on, or take the weights as they are "
                "(step.release)."
            )

    def writing(self, *, everything: bool = False) -> Writing:
        """Inside, this thread alone writes the state. `everything`: all of it, so that it is whole afterwards."""
        return Writing(self, everything)

    def count(self) -> int:
        """The steps that the state has seen. Waits for the device."""
        found: Tensors = self._state()
        return sum(int(t) for name, t in found.items() if keys.split(name)[0] == keys.COUNTS)


class Writing:
    """A write of a step's state; see `Turn.writing`."""

    now: Writing | None = None
    """The one in the main thread."""

    def __init__(self, turn: Turn, everything: bool) -> None:
        self._turn, self._everything = turn, everything
        self._former: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._waiting: list[int] = []
        self._outer: Writing | None = None
        self._count: int | None = None

    def __enter__(self) -> None:
        turn = self._turn
        turn._lock.acquire()
        try:
            if not self._everything:
                turn.check()
            self._outer = Writing.now
            if threading.current_thread() is threading.main_thread() and self._outer is None:
                Writing.now = self
                self.put_off()
            turn._begun += 1
        except BaseException:
            self._leave()
            raise

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        # An exception of a loss, a hook or a guard comes before the first write.
        turn, refused = self._turn, kind is not None and issubclass(kind, Exception)
        if kind is None and self._everything:
            turn._ended = turn._begun
        elif kind is None or refused or (self._count is not None and self._count == turn.count()):
            turn._ended += 1
        self._leave()

    def _leave(self) -> None:
        if Writing.now is self:
            Writing.now = None
        try:
            self.let_through()
        finally:
            self._turn._lock.release()

    # ------------------------------------------------------------------ signals

    def put_off(self) -> None:
        """From now on signals wait."""
        for number in _NUMBERS:
            if callable(handler := handlers.getsignal(number)):
                self._former[number] = handler
                handlers.signal(number, self._wait)

    def let_through(self) -> None:
        """From now on signals are what they were, and those that waited are handled."""
        raised: BaseException | None = None
        for number, handler in self._former.items():
            try:
                handlers.signal(number, handler)
            except BaseException as error:  # a handler that was put back before has just run
                handlers.signal(number, handler)
                raised = error
        former, waiting = self._former, self._waiting
        self._former, self._waiting = {}, []
        if raised is not None:
            raise raised
        for number in waiting:
            former[number](number, sys._getframe())

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if number in self._waiting:  # meant at once
            handler = self._former[number]
            self._waiting.remove(number)
            self.let_through()
            handler(number, frame)
        else:
            self._waiting.append(number)

    def compiles(self) -> None:
        """What follows takes long and, until its end, writes nothing: signals do not wait for it."""
        self._count = self._turn.count()
        self.let_through()


def compiling() -> None:
    """Inside of a write: a program is compiled now, which may be interrupted. It ends with the write."""
    if Writing.now is not None and threading.current_thread() is threading.main_thread():
        Writing.now.compiles()


def in_turn(method: Callable[Concatenate[Owner, Given], Result]) -> Callable[Concatenate[Owner, Given], Result]:
    """`method` of an object with a ``_turn``, run by one thread at a time."""

    @functools.wraps(method)
    def run(self: Owner, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        turn: Turn = self._turn  # type: ignore[attr-defined]
        with turn:
            return method(self, *args, **kwargs)

    return run
