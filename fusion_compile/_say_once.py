"""A warning for each thing that a user should know, once, at the user's own line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from fusion_compile.passes._user_frame import is_the_users


class SayOnce:
    """Call it with what the sentence is about, and the sentence."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, about: str, sentence: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warnings.warn(sentence, stacklevel=_levels_to_the_user())


def _levels_to_the_user() -> int:
    """From the caller to the innermost frame that is neither this package's nor torch's."""
    level = 1
    at: FrameType | None = sys._getframe(1)
    while at is not None and not is_the_users(at.f_code.co_filename):
        level, at = level + 1, at.f_back
    return level
