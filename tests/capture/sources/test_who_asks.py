"""Frames are the user's, torch's or Python's; what writes for people is aside."""

from __future__ import annotations

import logging
import sys
from types import FrameType

import torch

from fusion_compile._capture.sources import who_asks


def caught(by: str) -> FrameType:
    """The frame of a function that `by` calls."""
    frames: list[FrameType] = []

    def take(*_: object) -> bool:
        frames.append(sys._getframe())
        return True

    if by == "logging":
        log = logging.Logger("frames")
        log.addFilter(take)
        log.warning("text")
    else:
        take()
    return frames[0]


def test_files_of_torch() -> None:
    assert who_asks.is_torch(torch.random.__file__, "random.py")
    assert not who_asks.is_torch(torch.random.__file__, "cuda/random.py") and not who_asks.is_torch(__file__)


def test_what_is_aside() -> None:
    assert who_asks.is_aside(logging.__file__) and who_asks.is_aside("<frozen importlib._bootstrap>")
    assert who_asks.is_aside("/x/lib/python3.11/site-packages/tqdm/std.py")
    assert not who_asks.is_aside("/x/project/warnings.py") and not who_asks.is_aside(__file__)


def test_a_filter_of_logging_asks_aside_and_other_code_does_not() -> None:
    here = sys._getframe()
    assert who_asks.asks_aside(caught("logging"))
    assert not who_asks.asks_aside(caught("nobody"), here)


def test_the_asker_is_the_innermost_frame_outside_of_the_standard_library() -> None:
    here = sys._getframe()
    assert who_asks.asker(here) is here and who_asks.innermost_user(here) is here
    assert who_asks.line_of(here).startswith(f"{__file__}:") and who_asks.line_of(None) == ""
    assert who_asks.asker(None) is None
