"""A call taken apart: its key is equal exactly for calls that one graph can serve."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile._sampler.graph.call import invoke, name_dim, sees_keywords, take_apart, what_varies


def test_what_varies_names_every_kind_of_difference() -> None:
    def forward(x: Any, size: Any = None) -> None: ...

    signature = inspect.signature(forward)
    keys = [
        take_apart(signature, args, {}).key
        for args in (({"a": torch.zeros(2, 3)},), ({"b": torch.zeros(3, 2).T}, 1), ({"b": torch.zeros(2, 3)}, True))
    ]
    assert len(set(keys)) == 3
    assert what_varies(keys) == (
        "x float32[2, 3] cpu / float32[2, 3] cpu with strides [1, 2]; by position: x / x, size; "
        "size left out / 1 / True"
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
    assert invoke(forward, call, call.arguments)[2] is pair


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


def open_ended(x: Any, /, *more: Any, **named: Any) -> Any:
    return x, more, named


def test_each_argument_goes_back_by_the_way_it_came() -> None:
    """What came by keyword once went back by position, and diffusers' wrapper did not find its LoRA scale."""
    for args, kwargs in (((1, 2), {}), ((1,), {"t": 2}), ((), {"t": 2, "x": 1}), ((1,), {"y": 3, "t": 2})):
        call = take_apart(SIGNATURE, args, kwargs)
        seen: list[Any] = []
        invoke(lambda *a, s=seen, **k: s.append((a, k)), call, call.arguments)
        assert seen == [(args, kwargs)]
    call = take_apart(inspect.signature(open_ended), (1, 2, 3), {"y": 4, "b": 5})
    assert call.arguments == {"x": 1, "more[0]": 2, "more[1]": 3, "b": 5, "y": 4}
    assert invoke(open_ended, call, call.arguments) == (1, (2, 3), {"b": 5, "y": 4})
    with pytest.raises(TypeError, match="'x' is given by position and again"):
        take_apart(inspect.signature(open_ended), (1,), {"x": 2})


class Plain(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return args, kwargs


class Wrapped(Plain):
    forward = functools.wraps(Plain.forward)(wrapper)  # type: ignore[assignment]


def test_keywords_count_where_the_model_can_see_them() -> None:
    hooked, replaced = Plain(), Plain()
    hooked.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    replaced.forward = functools.partial(replaced.forward)  # type: ignore[method-assign]
    assert [sees_keywords(m) for m in (Plain(), Wrapped(), hooked, replaced)] == [False, True, True, True]
    x = torch.zeros(2)
    signature = inspect.signature(Plain().forward)
    for matter, equal in ((True, False), (False, True)):
        by_position = take_apart(signature, (x,), {}, keywords_matter=matter)
        keys = [by_position.key, take_apart(signature, (), {"x": x}, keywords_matter=matter).key]
        assert (keys[0] == keys[1]) is equal


def test_a_size_is_named_by_argument_and_dimension() -> None:
    assert name_dim(("x", "t"), (0, 1)) == "x.shape[1]"
    assert name_dim(("x", "ids", "ids"), (2, 0)) == "ids(2).shape[0]"
