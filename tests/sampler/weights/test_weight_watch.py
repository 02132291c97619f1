"""A weight watch sees versions, addresses and contents."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._sampler.weights.weight_watch import WeightWatch, is_part_of_more


def watched() -> tuple[dict[str, nn.Parameter], WeightWatch]:
    weights = {name: nn.Parameter(torch.randn(3)) for name in ("a", "b")}
    return weights, WeightWatch(dict(weights))


def test_an_in_place_write_and_a_new_address_change_the_version() -> None:
    weights, watch = watched()
    assert watch.versions_changed() == frozenset()
    with torch.no_grad():
        weights["a"].mul_(2)
    assert watch.versions_changed() == {"a"}
    watch.accept_current()
    weights["b"].data = torch.randn(3)
    assert watch.versions_changed() == {"b"}


def test_a_write_through_data_changes_the_contents_alone() -> None:
    weights, watch = watched()
    weights["b"].data.mul_(2)
    assert watch.versions_changed() == frozenset() and watch.contents_changed() == {"b"}
    watch.accept_current()
    assert watch.contents_changed() == frozenset()


def test_a_released_weight_is_empty_and_not_changed() -> None:
    weights, watch = watched()
    weights["a"].data = torch.empty(0)
    assert watch.contents_changed() == frozenset()


def test_a_view_into_a_larger_storage_must_be_compared() -> None:
    bank = torch.randn(6)
    view = nn.Parameter(torch.empty(3))
    view.data = bank[:3]
    assert is_part_of_more(view) and WeightWatch({"w": view}).must_compare
    assert not watched()[1].must_compare


def test_replaced_tensors_are_watched_under_their_names() -> None:
    weights, watch = watched()
    other = nn.Parameter(torch.randn(3))
    watch.replace({"a": other, "unknown": other})
    with torch.no_grad():
        weights["a"].mul_(2)
    assert watch.versions_changed() == frozenset()
    with torch.no_grad():
        other.mul_(2)
    assert watch.versions_changed() == {"a"}


def test_inference_tensors_are_uncounted() -> None:
    with torch.inference_mode():
        counts_nothing = torch.ones(2)
    assert WeightWatch({"w": counts_nothing, "v": torch.ones(2)}).uncounted() == {"w"}
