"""Named groups: read from what the user gives, assigned to routes, and numbers that nothing reads refused."""

from __future__ import annotations

from typing import Any

import pytest

from fusion_compile._state.groups import NamedGroup, assign, numbers_of, read_groups, refuse_unread
from fusion_compile._state.routing import Route

KNOWN = {"lr": 1.0, "weight_decay": 0.1}


def test_a_group_without_a_name_is_called_by_its_index() -> None:
    given: list[dict[str, Any]] = [{"params": ["a"], "name": "first", "lr": 0.5}, {"params": ("b", "c")}]
    first, second = read_groups(given, KNOWN, "adamw")
    assert first == NamedGroup("first", ("a",), {"lr": 0.5})
    assert second == NamedGroup("group1", ("b", "c"), {})
    assert numbers_of((first, second)) == {"first.lr": 0.5}
    assert read_groups([], KNOWN, "adamw") == ()


def test_routes_get_the_group_that_a_pattern_finds_in_their_name() -> None:
    routes = [Route(name, (2,), "scalar", "1-D") for name in ("0.weight", "0.bias", "1.bias")]
    groups = (NamedGroup("biases", (r"bias$",), {}),)
    assert [r.group for r in assign(routes, groups)] == ["default", "biases", "biases"]
    assert assign(routes, ()) == tuple(routes)


def test_a_number_that_is_not_read_is_refused_with_those_that_are() -> None:
    numbers = ("lr", "weight_decay")
    refuse_unread("group 'biases'", numbers, {"lr", "weight_decay"}, "adamw")
    with pytest.raises(
        ValueError, match=r"^group 'biases' sets 'weight_decay', but muon does not read it .* It reads lr, scalar_lr"
    ):
        refuse_unread("group 'biases'", numbers, {"scalar_lr", "lr"}, "muon")
