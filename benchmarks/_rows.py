"""One row a check: it runs by itself, what goes wrong in it is its row's text, and the next one runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

OK, FAILED, UNVERIFIED, NOT_RUN = "ok", "FAILED", "unverified on a GPU", "not run"


@dataclasses.dataclass
class Row:
    """`verdict`: one of the four above. `detail`: one line. `numbers`, `trace`: for the JSON."""

    group: str
    check: str
    verdict: str
    detail: str
    seconds: float = 0.0
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    trace: str = ""


class Disagreement(AssertionError):
    """What was seen is not what is promised."""


class NotRun(Exception):
    """The check cannot be made here; the text says why."""


class Check:
    """What a check is given: `note` collects the row's text, `require` fails it, `require_on_gpu` fails it on a GPU and
    on a CPU marks it unverified."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.notes: list[str] = []
        self.numbers: dict[str, Any] = {}
        self.unverified = False

    def note(self, text: str, **numbers: Any) -> None:
        self.notes.append(text)
        self.numbers |= numbers

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Disagreement(otherwise)

    def require_on_gpu(self, holds: bool, otherwise: str) -> None:
        if self.on_gpu:
            self.require(holds, otherwise)
        else:
            self.unverified = True


class Rows:
    """The rows of one group. No check begins later than `until` (`time.monotonic`), and one that runs `grace` seconds
    past it is interrupted."""

    def __init__(self, group: str, until: float, on_gpu: bool, sink: Callable[[Row], None], grace: float = 20) -> None:
        self.group, self.until, self.on_gpu, self._sink, self._grace = group, until, on_gpu, sink, grace

    def add(self, check: str, verdict: str, detail: str, **more: Any) -> None:
        self._sink(Row(self.group, check, verdict, detail, **more))

    def check(self, name: str, body: Callable[[Check], None]) -> bool:
        """Run `body`; its row; whether it held or could not be judged here."""
        if time.monotonic() >= self.until:
            self.add(name, NOT_RUN, "time")
            return False
        seen = Check(self.on_gpu)
        began = time.monotonic()
        verdict, trace = OK, ""
        try:
            with _alarm(self.until + self._grace - began):
                body(seen)
            if seen.unverified:
                verdict = UNVERIFIED
        except NotRun as reason:
            verdict = NOT_RUN
            seen.note(str(reason))
        except Exception as error:
            verdict, trace = FAILED, traceback.format_exc()
            text = str(error) if isinstance(error, Disagreement) else f"{type(error).__name__}: {error}"
            seen.notes.insert(0, one_line(text))
        detail = "; ".join(seen.notes)
        self.add(name, verdict, detail, seconds=round(time.monotonic() - began, 1), numbers=seen.numbers, trace=trace)
        return verdict in (OK, UNVERIFIED)


def one_line(text: str, longest: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after `seconds`; only where signals can be had, which is the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s, the time that was left")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def append_to(path: Path) -> Callable[[Row], None]:
    """A sink that keeps every row, also when the process dies after it."""

    def write(row: Row) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(dataclasses.asdict(row), default=str) + "\n")

    return write


def read_rows(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def one_line_of_table(line: str, widest: int = 230) -> str:
    return line if len(line) <= widest else line[: widest - 1] + "…"
