"""Whose code asks for a value, and whether the answer can reach what is computed.

A time or an environment variable that `logging`, `warnings` or a progress bar reads ends in a text for people. The same
read on a line of the user's, or of a model library, may decide what is computed.
"""

from __future__ import annotations

import functools
import os
from types import FrameType

from fusion_compile._capture.python_state.whose_code import is_standard_library, is_user_code
from fusion_compile.passes._user_frame import TORCH, is_ours

_FOR_PEOPLE = ("/logging/", "/warnings.py", "/linecache.py", "/traceback.py")
"""Files of the standard library that write for people."""
_LIBRARIES_FOR_PEOPLE = (
    "/tqdm/",
    "/rich/",
    "/loguru/",
    "/transformers/utils/logging.py",
    "/diffusers/utils/logging.py",
)
_IMPORTS = ("<frozen importlib", "<frozen zipimport")
_LIBRARIES_IMPORTS = ("/import_utils.py",)
"""Imports, and questions about what can be imported, whose answers do not change while a process runs."""


@functools.lru_cache(maxsize=4096)
def is_aside(path: str) -> bool:
    """Whether code in this file writes for people or imports modules: its reads do not reach what is computed."""
    if path.startswith(_IMPORTS):
        return True
    unix = os.path.abspath(path).replace(os.sep, "/")
    if is_standard_library(path):
        return "/importlib/" in unix or any(mark in unix for mark in _FOR_PEOPLE)
    installed = any(mark in unix for mark in ("/site-packages/", "/dist-packages/"))
    return installed and any(mark in unix for mark in (*_LIBRARIES_FOR_PEOPLE, *_LIBRARIES_IMPORTS))


def asker(frame: FrameType | None) -> FrameType | None:
    """The innermost frame from `frame` outwards whose file is not the standard library's."""
    while frame is not None and is_standard_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def innermost_user(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of the user's or of a library from `frame` outwards."""
    while frame is not None and not is_user_code(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def asks_aside(frame: FrameType | None, until: FrameType | None = None) -> bool:
    """Whether any frame from `frame` outwards writes for people or imports modules.

    The search ends before the frame `until`, and where the user's code was called by this package.
    """
    entered = False
    while frame is not None and frame is not until:
        path = frame.f_code.co_filename
        if is_aside(path):
            return True
        if entered and is_ours(path):
            return False
        entered = entered or is_user_code(path)
        frame = frame.f_back
    return False


def is_torch(path: str, *parts: str) -> bool:
    """Whether a file is torch's, and one of `parts` (``"utils/checkpoint.py"``) if any are given."""
    full = os.path.abspath(path)
    below = full[len(TORCH) :].replace(os.sep, "/")
    return full.startswith(TORCH) and (not parts or below.startswith(parts)) and not is_ours(path)


def line_of(frame: FrameType | None) -> str:
    """``"file:line"`` of a frame, or ``""``."""
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
