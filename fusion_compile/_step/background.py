"""Checkpoints are written in the background, one at a time, while training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread that writes; Python ends after it has."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def begin(self, write: Callable[[], None]) -> Future[None]:
        """Write in the background. What it raises the future raises, and a warning says it, too."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "fusion_compile.save")
        self._last = self._thread.submit(_said, write)
        return self._last

    def wait(self) -> None:
        """Wait until what was begun has ended, well or not."""
        if self._last is not None:
            futures.wait([self._last])  # raises nothing of the write's, and lets Ctrl-C through
            self._last = None


def _said(write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:
        warnings.warn(f"in the background: {error}", stacklevel=2)
        raise
