"""What the broken programs and their repaired twins are given as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Example(NamedTuple):
    """`fn`: what `explain` takes, with `args` and then, in order, each of `calls`."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    calls: tuple[tuple[Any, ...], ...] = ()
