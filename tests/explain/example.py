"""The form of the broken programs and their repaired twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A program to explain. `args`: of its first call. `calls`: further calls, and what is called between them."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    calls: tuple[tuple[Any, ...] | Callable[[], object], ...] = ()
