"""The interface that finds the row which serves a call, for learned rows and for a range, and its four answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

NAMED_ENTRIES = 4
"""Entries of a timestep that a message names."""


@dataclass(frozen=True)
class Seen:
    """The CPU saw the timestep, and row `row` serves it."""

    row: int


@dataclass(frozen=True)
class Found:
    """The device looks the row up: `row` ``[1]`` int64; `known` ``[]`` bool says whether it serves the timestep."""

    row: Tensor
    known: Tensor


@dataclass(frozen=True)
class Learnable:
    """The timestep has no row and may get one. `values`: its first entries. `learn()` reserves a row and returns it."""

    values: list[float]
    learn: Callable[[], int]


@dataclass(frozen=True)
class Unserved:
    """No row can serve the timestep, so the whole model must.

    `values`: its first entries. `topic`: what a warning is about, which is given once. `why`, `remedy`: the rest of a
    sentence that begins with the timestep, and a sentence.
    """

    values: list[float]
    topic: str
    why: str
    remedy: str


Located: TypeAlias = Seen | Found | Learnable | Unserved


@dataclass(frozen=True)
class Assigned:
    """`rows`: the row of each value of a schedule. `fresh`: row -> timestep, of the rows that were given away now."""

    rows: list[int]
    fresh: dict[int, Tensor]


class Rows(Protocol):
    """The rows of one program. `len()`: rows in use, which are 0 to ``len() - 1``.

    A request is any object that stands for one; None is a new request.
    """

    @property
    def capacity(self) -> int:
        """Rows that a table must have room for."""
        ...

    def __len__(self) -> int: ...

    def locate(self, t: Tensor, request: object, *more: Tensor) -> Located:
        """The row that serves the timestep `t`, of any shape, in a call for `request`.

        `more`: further clocks, where the model has several.

        Raises RuntimeError when an earlier call, which nobody looked at, had a timestep without a row.
        """
        ...

    def starts_trajectory(self, row: int, request: object, *, new: bool) -> bool:
        """Count a call that `Seen` or `Learnable` answered; return whether a trajectory starts with it.

        `new`: `request` is new with this call.
        """
        ...

    def without_row(self, values: Tensor) -> list[float]:
        """The values of `values` ``[n]``, on the CPU and in the dtype of the timestep, that have no row."""
        ...

    def assign(self, values: Tensor) -> Assigned:
        """Give each of `values` a row; equal values have one."""
        ...

    def has_only(self, values: Tensor) -> bool:
        """Whether every row in use serves one of `values`."""
        ...
