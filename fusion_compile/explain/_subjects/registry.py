"""The types of this package that explain themselves. The public doors register theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fusion_compile.explain._explanation import Explanation

T = TypeVar("T")


@dataclass(frozen=True)
class Subject(Generic[T]):
    """How to explain and watch the objects of one type.

    `explain`: takes an object and the device whose peak rates the times assume.
    `is_compiled`: whether the object already holds its programs, so that a call compiles nothing.
    `state`, `restore`: read what a call changes, and put it back; None for a type whose calls change nothing.
    """

    explain: Callable[[T, str | None], Explanation]
    is_compiled: Callable[[T], bool] = lambda _: False
    state: Callable[[T], Any] | None = None
    restore: Callable[[T, Any], object] | None = None


_SUBJECTS: dict[type, Subject[Any]] = {}


def register(kind: type[T], subject: Subject[T]) -> None:
    """Let `explain` treat the objects of `kind`, subclasses included, as `subject` says."""
    _SUBJECTS[kind] = subject


def subject_of(obj: object) -> Subject[Any] | None:
    """Return what is registered for the type of `obj` or its nearest base class; None for other objects."""
    return next((_SUBJECTS[kind] for kind in type(obj).__mro__ if kind in _SUBJECTS), None)
