"""Frames in formatted stacks, and the user's line among them."""

from __future__ import annotations

import torch

from fusion_compile.explain import _compat
from fusion_compile.explain._run.stacks import stack_frames, users_line

STACK = f"""
  File "/home/u/train.py", line 3, in <module>
    model(x)
  File "/home/u/model.py", line 7, in forward
    return x.sin()
  File "{torch.__file__}", line 9, in inside
    ...
  File "{_compat.__file__}", line 11, in ours
    ...
"""


def test_frames_are_read_outermost_first() -> None:
    frames = stack_frames(STACK)
    assert frames[:2] == (("/home/u/train.py", 3, "model(x)"), ("/home/u/model.py", 7, "return x.sin()"))
    assert [line for _, line, _ in frames] == [3, 7, 9, 11]


def test_the_users_line_is_the_innermost_outside_torch_and_this_package() -> None:
    assert users_line(stack_frames(STACK)) == "/home/u/model.py:7"
    assert users_line(stack_frames(STACK)[2:]) == users_line(()) == ""
