"""A warning for each thing that a user should know, once, at the user's own line."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch

_OURS = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)


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
    while at is not None and at.f_code.co_filename.startswith(_OURS):
        level, at = level + 1, at.f_back
    return level
