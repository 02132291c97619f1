"""A warning for each thing that a user should know, once."""

from __future__ import annotations

import warnings


class SayOnce:
    """Call it with what the sentence is about, and the sentence."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, about: str, sentence: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warnings.warn(sentence, stacklevel=4)
