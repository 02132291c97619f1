"""Nested state as one flat dictionary: paths are a file format, and the way back gives the same tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusion_compile._state.flat_tree import flatten, form, unflatten


class Moments(NamedTuple):
    mu: dict[str, Any]
    count: torch.Tensor  # type: ignore[assignment]  # a tuple has a method of this name


def tree() -> Any:
    return (Moments({"scalar/float32": torch.ones(2)}, torch.zeros(())), (), {"inner": (torch.ones(1),)})


def test_paths_are_field_names_indices_and_keys_in_a_fixed_order() -> None:
    paths = ["optimizer/0/mu/scalar/float32", "optimizer/0/count", "optimizer/2/inner/0"]
    assert [path for path, _ in flatten(tree(), "optimizer")] == paths
    assert [path for path, _ in flatten(tree())] == [path.removeprefix("optimizer/") for path in paths]


def test_the_way_back_gives_the_same_types_and_the_same_tensors() -> None:
    given = tree()
    flat = dict(flatten(given, "s"))
    back = unflatten(form(given, "s"), flat)
    assert isinstance(back[0], Moments) and back[1] == () and isinstance(back[2]["inner"], tuple)
    assert all(a is b for (_, a), (_, b) in zip(flatten(back), flatten(given), strict=True))


def test_the_form_holds_no_tensor() -> None:
    moments, nothing, inner = form(tree(), "s")
    assert moments == ({"scalar/float32": "s/0/mu/scalar/float32"}, "s/0/count")
    assert (nothing, inner) == ((), {"inner": ("s/2/inner/0",)})
