"""Progress of slow phases on stderr, when a person is watching."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Show `what` with a running clock while the block runs, and its seconds afterwards.

    It is silent without a terminal, and with ``FUSION_COMPILE_PROGRESS=0`` in the environment (for programs with
    progress bars of their own).
    """
    if not sys.stderr.isatty() or os.environ.get("FUSION_COMPILE_PROGRESS") == "0":
        yield
        return
    console = Console(stderr=True)
    started = time.perf_counter()
    with console.status(f"fusion_compile: {what} …"):
        yield
    console.print(f"fusion_compile: {what}: {time.perf_counter() - started:.1f} s", highlight=False)
