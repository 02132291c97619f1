"""A call taken apart: its key is equal exactly for calls that one graph can serve."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fusion_compile._sampler.graph.call import invoke, name_dim, take_apart, what_varies


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


def forward(x: Any, t: Any, *, y: Any = None) -> tuple[Any, Any, Any]:
    return x, t, y


SIGNATURE = inspect.signature(forward)


def test_a_call_is_bound_and_its_tensors_are_listed_with_their_owners() -> None:
    pair = {"a": torch.zeros(2), "b": torch.ones(2)}
    call = take_apart(SIGNATURE, (torch.zeros(3), 0.5), {"y": pair})
    assert call.owners == ("x", "y", "y") and call.key.constants == (("t", float, 0.5),)
    rebuilt = call.rebuild([torch.tensor(1), torch.tensor(2), torch.tensor(3)])
    assert (
        rebuilt["x"] == 1 and rebuilt["t"] == 0.5 and {k: int(v) for k, v in rebuilt["y"].items()} == {"a": 2, "b": 3}
    )
    assert invoke(forward, SIGNATURE, call.arguments)[2] is pair


def test_keys_of_one_family_differ_in_sizes_alone() -> None:
    first = take_apart(SIGNATURE, (torch.zeros(2, 3), 1), {}).key
    larger = take_apart(SIGNATURE, (torch.zeros(5, 3), 1), {}).key
    other = take_apart(SIGNATURE, (torch.zeros(2, 3).double(), 1), {}).key
    assert first != larger and first.family == larger.family != other.family


def test_autocast_is_part_of_the_key() -> None:
    plain = take_apart(SIGNATURE, (torch.zeros(2), 1), {}).key
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = take_apart(SIGNATURE, (torch.zeros(2), 1), {}).key
    assert plain.autocast is None and cast.autocast is torch.bfloat16


def test_a_wrong_call_is_refused_as_the_model_itself_would() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        take_apart(SIGNATURE, (1, 2), {"z": 3})


def test_a_size_is_named_by_argument_and_dimension() -> None:
    assert name_dim(("x", "t"), (0, 1)) == "x.shape[1]"
    assert name_dim(("x", "ids", "ids"), (2, 0)) == "ids(2).shape[0]"
