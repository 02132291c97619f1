"""Functions that read from outside are known by themselves; the rest is not asked about."""

from __future__ import annotations

import contextvars
import datetime
import os
import random
import time
from typing import Any

import pytest
import torch

from fusion_compile._capture.sources.read_calls import builtin_reading, is_numpy_draw, iterates, python_reading


@pytest.mark.parametrize(
    ("function", "reading"),
    [
        (time.time, "clock"),
        (time.perf_counter_ns, "clock"),
        (datetime.datetime.now, "clock"),
        (os.urandom, "random"),
        (os.stat, "file"),
        (print, "output"),
        (random.random, "random"),
        (random.Random(0).getrandbits, "random"),
        (torch.Generator().manual_seed, "torch random"),
        (contextvars.ContextVar("v").get, "context"),
        (len, None),
        (time.sleep, None),
        (datetime.datetime.fromtimestamp, None),
        (torch.Generator().initial_seed, None),
        ([].append, None),
    ],
)
def test_c_functions(function: Any, reading: str | None) -> None:
    assert builtin_reading(function) == reading


def test_python_functions() -> None:
    import torch.utils.data.dataloader as loader

    assert python_reading(type(os.environ).__getitem__.__code__) == "environment"
    assert python_reading(random.Random.__init__.__code__) == "random"
    assert python_reading(torch.random.set_rng_state.__code__) == "torch random"
    assert python_reading(loader._BaseDataLoaderIter.__next__.__code__) == "iterator"
    assert python_reading(test_python_functions.__code__) == "user"
    assert python_reading(torch.nn.Module.named_parameters.__code__) == ""
    assert python_reading(os.path.join.__code__) == ""


def test_which_code_may_move_an_iterator_or_draw() -> None:
    assert iterates((lambda xs: [x for x in xs]).__code__)  # noqa: C416
    assert iterates((lambda xs: list(xs)).__code__)
    assert not iterates((lambda x: x + 1).__code__)
    assert is_numpy_draw((lambda rng: rng.normal()).__code__)
    assert not is_numpy_draw((lambda x: x + 1).__code__)
