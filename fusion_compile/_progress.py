"""Progress of slow phases on stderr, when a person is watching."""

from __future__ import annotations

import contextlib
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
    with console.status(f"fusion_compile: {what} …"):
        yield
    console.print(f"fusion_compile: {what}: {time.perf_counter() - started:.1f} s", highlight=False)


def following(items: Iterable[T], count: int | None, what: str) -> Iterator[T]:
    """`items`, with a bar that shows how many of `count` were given, where `stage` would show something."""
    console = Console(stderr=True)
    if not _is_watched(console):
        yield from items
    else:
        yield from track(items, f"fusion_compile: {what}", total=count, console=console)


def _is_watched(console: Console) -> bool:
    return (sys.stderr.isatty() or console.is_jupyter) and os.environ.get("FUSION_COMPILE_PROGRESS") != "0"
