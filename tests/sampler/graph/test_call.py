"""A call taken apart: its key is equal exactly for calls that one graph can serve."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fusion_compile._sampler.graph.call import take_apart, what_varies


def test_what_varies_names_every_kind_of_difference() -> None:
    def forward(x: Any, size: Any = None) -> None: ...

    signature = inspect.signature(forward)
    keys = [
        take_apart(signature, args, {}).key
        for args in (({"a": torch.zeros(2, 3)},), ({"b": torch.zeros(3, 2).T}, 1), ({"b": torch.zeros(2, 3)}, True))
    ]
    assert len(set(keys)) == 3
    assert what_varies(keys) == (
        "x float32[2, 3] cpu / float32[2, 3] cpu with strides [1, 2]; size left out / 1 / True"
    )
    assert what_varies(keys[:1]) == ""
    assert take_apart(signature, (1.0,), {}).key != take_apart(signature, (1,), {}).key
