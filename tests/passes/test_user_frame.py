"""The user's frame: neither torch's, nor this package's, nor generated code."""

from __future__ import annotations

import os

import torch
from torch import fx

import fusion_compile.sampler
from fusion_compile.passes import hoist_time_conditioning
from fusion_compile.passes._user_frame import innermost, is_ours, is_outside_torch, is_the_users, user_line

IN_TORCH = os.path.join(os.path.dirname(torch.__file__), "nn", "modules", "linear.py")


def test_files_of_torch_and_of_this_package_are_not_the_users() -> None:
    assert not is_outside_torch(IN_TORCH) and not is_the_users(IN_TORCH)
    sampler = fusion_compile.sampler.__file__
    assert is_ours(sampler) and is_outside_torch(sampler) and not is_the_users(sampler)
    assert is_ours(hoist_time_conditioning.__code__.co_filename)  # passes lie in a folder of their own
    assert is_the_users(__file__) and not is_ours(__file__)


def test_typed_code_is_the_users_and_generated_code_is_not() -> None:
    assert is_the_users("<stdin>") and is_the_users("<ipython-input-3-abc>")
    assert not is_the_users("<eval_with_key>.3") and not is_the_users("<frozen importlib._bootstrap>")


def test_the_innermost_line_outside_torch_is_named() -> None:
    assert innermost([("model.py", 3), ("block.py", 7), (IN_TORCH, 99)]) == "block.py:7"
    assert innermost([(IN_TORCH, 99)]) == ""


def test_a_nodes_line_is_read_from_its_stack_trace() -> None:
    node = fx.Graph().placeholder("x")
    assert user_line(node) == ""
    node.meta["stack_trace"] = f'  File "model.py", line 12, in forward\n  File "{IN_TORCH}", line 5, in forward\n'
    assert user_line(node) == "model.py:12"
