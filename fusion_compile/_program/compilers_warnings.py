"""Warnings of a compiler, where warnings are errors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def are_no_errors() -> Iterator[None]:
    """Inside, what ``-W error`` would raise is a warning.

    torch warns while it compiles (of an ``lru_cache`` that Dynamo looks through, of a deprecated function that it calls
    itself). Raised there, a warning is an internal error of the compiler. What the loss itself warns of was raised
    before, when it ran for real.
    """
    with warnings.catch_warnings():
        kept = list(warnings.filters)
        warnings.resetwarnings()
        for action, message, category, module, line in reversed(kept):
            gentle: Any = "default" if action == "error" else action
            kind: Any = category
            warnings.filterwarnings(gentle, _pattern(message), kind, _pattern(module), line)
        yield


def _pattern(compiled: object) -> str:
    return str(getattr(compiled, "pattern", compiled or ""))
