"""Which values are alike."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fusion_compile._capture.python_state.alike import is_alike


class Method:
    def method(self) -> None: ...


METHOD, TENSOR = Method(), torch.ones(1)
ALIKE = [
    (0.5, float("0.5")),
    (float("nan"), float("nan")),
    ("a" * 50, "a" * 50),
    ([1, {"a": (2.5,)}], [1, {"a": (2.5,)}]),
    ({1, 2}, {2, 1}),
    ([TENSOR], [TENSOR]),
    (np.ones(2), np.ones(2)),
    (METHOD.method, METHOD.method),
    (functools.partial(print, end=""), functools.partial(print, end="")),
]
UNLIKE = [
    (1, 1.0),
    (True, 1),
    (0.0, -0.0),
    ([1], (1,)),
    ([1], [1, 2]),
    ({"a": 1}, {"b": 1}),
    (torch.ones(1), torch.ones(1)),
    (nn.Tanh(), nn.Tanh()),
    (np.ones(2), np.ones(2, dtype=np.float32)),
    (Method().method, Method().method),
    (functools.partial(print, end=""), functools.partial(print, end="x")),
    (None, 0),
]


@pytest.mark.parametrize(("a", "b"), ALIKE)
def test_alike(a: Any, b: Any) -> None:
    assert is_alike(a, b)


@pytest.mark.parametrize(("a", "b"), UNLIKE)
def test_unlike(a: Any, b: Any) -> None:
    assert not is_alike(a, b)


def test_a_weak_reference_whose_object_is_gone_is_alike_another() -> None:
    import weakref

    class Thing:
        pass

    one, other, gone = Thing(), Thing(), Thing()
    dead = weakref.ref(gone)
    del gone
    assert is_alike([weakref.ref(one)], [dead]) and not is_alike([weakref.ref(one)], [weakref.ref(other)])
