"""Progress of slow phases on stderr, when a person is watching."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Show `what` with a running clock while the block runs, and its seconds afterwards.

    It is silent without a terminal or notebook, and with ``FUSION_COMPILE_PROGRESS=0`` in the environment (for programs
    with progress bars of their own).
    """
    console = Console(stderr=True)
    if not _is_watched(console):
        yield
        return
    started = time.perf_counter()
    if console.is_jupyter:  # where rich needs a package of its own to show anything that moves
        print(f"\rfusion_compile: {what} …", end="", file=sys.stderr, flush=True)
        yield
        print(f"\rfusion_compile: {what}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        return
    with console.status(f"fusion_compile: {what} …"):
        yield
    console.print(f"fusion_compile: {what}: {time.perf_counter() - started:.1f} s", highlight=False)


def following(items: Iterable[T], count: int | None, what: str) -> Iterator[T]:
    """`items`, with a bar that shows how many of `count` were given, where `stage` would show something."""
    console = Console(stderr=True)
    if not _is_watched(console):
        yield from items
    elif console.is_jupyter:
        yield from _with_a_line(items, count, what)
    else:
        yield from track(items, f"fusion_compile: {what}", total=count, console=console)


def _with_a_line(items: Iterable[T], count: int | None, what: str) -> Iterator[T]:
    """`items`, with a bar in one line of text that is written again at most five times a second."""
    shown, done = -math.inf, 0

    def show() -> None:
        whole = "" if not count else f" of {count} [{'#' * (20 * done // count):<20}]"
        print(f"\rfusion_compile: {what}: {done}{whole}", end="", file=sys.stderr, flush=True)

    for item in items:
        if time.perf_counter() - shown > 0.2:
            show()
            shown = time.perf_counter()
        yield item
        done += 1
    show()
    print(file=sys.stderr, flush=True)


def _is_watched(console: Console) -> bool:
    return (sys.stderr.isatty() or console.is_jupyter) and os.environ.get("FUSION_COMPILE_PROGRESS") != "0"
