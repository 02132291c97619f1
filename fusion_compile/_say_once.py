"""Warnings that are given once, at the user's own line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from fusion_compile.passes._user_frame import is_the_users


class SayOnce:
    """Warn once about each subject: call it with the subject and the sentence."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, about: str, sentence: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warnings.warn(sentence, stacklevel=_levels_to_the_user())

    def has_said(self, about: str) -> bool:
        """Whether the warning about this subject was given."""
        return about in self._said


def _levels_to_the_user() -> int:
    """Stack levels from the caller to the innermost frame outside this package and torch."""
    level = 1
    at: FrameType | None = sys._getframe(1)
    while at is not None and not is_the_users(at.f_code.co_filename):
        level, at = level + 1, at.f_back
    return level
