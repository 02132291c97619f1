"""Which frame of a stack is the user's: the one module that knows which folders are torch's and which are ours.

A message that names a line must name one that the reader can change.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable

import torch
from torch import fx


def _folder(package: str) -> str:
    """The folder of an importable package, with a separator at its end."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return os.path.join(os.path.abspath(next(iter(spec.submodule_search_locations))), "")


TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")
"""torch's folder."""
OURS = (_folder(__name__.partition(".")[0]), os.path.join(os.path.dirname(os.path.abspath(__file__)), ""))
"""This package's folders. Passes lie outside of the first one in an editable installation."""

_TYPED_IN = ("<stdin>", "<string>", "<ipython")
"""Code without a file that a person wrote; other names in angle brackets are generated code."""


def is_ours(path: str) -> bool:
    """Whether a frame's file belongs to this package."""
    return os.path.abspath(path).startswith(OURS)


def is_outside_torch(path: str) -> bool:
    """Whether a frame's file is neither torch's nor generated code."""
    if path.startswith("<"):
        return path.startswith(_TYPED_IN)
    return not os.path.abspath(path).startswith(TORCH)


def is_the_users(path: str) -> bool:
    """Whether a frame's file is neither torch's, nor this package's, nor generated code."""
    return is_outside_torch(path) and not is_ours(path)


def innermost(paths_and_lines: Iterable[tuple[str, int]]) -> str:
    """``"file:line"`` of the last frame outside torch of a stack that is given outermost first; else ``""``."""
    outside = [(path, line) for path, line in paths_and_lines if is_outside_torch(path)]
    return f"{outside[-1][0]}:{outside[-1][1]}" if outside else ""


def user_line(node: fx.Node) -> str:
    """``"file:line"`` of the innermost frame outside torch that made `node`, or ``""``.

    Frames of this package count: an optimizer's node is made by the optimizer's line.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return innermost((path, int(line)) for path, line in frames)
