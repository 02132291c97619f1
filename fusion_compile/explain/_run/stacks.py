"""The frames in a stack that torch formatted as text."""

from __future__ import annotations

import re

from fusion_compile.passes._user_frame import is_the_users

Frame = tuple[str, int, str]
"""File, line number, source line."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n? *([^\n]*)')


def stack_frames(text: str) -> tuple[Frame, ...]:
    """Read the frames of a formatted stack, outermost first."""
    return tuple((path, int(line), source.strip()) for path, line, source in _FRAME.findall(text))


def users_line(frames: tuple[Frame, ...]) -> str:
    """Return ``file:line`` of the innermost of `frames` that is the user's; "" if none is."""
    return next((f"{path}:{line}" for path, line, _ in reversed(frames) if is_the_users(path)), "")
