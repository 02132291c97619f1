"""Tests: what ranks hear of each other, and a number that stands for what they say."""

from __future__ import annotations

from typing import Any

from fusion_compile._ranks.channel import Channel, number_of
from fusion_compile._ranks.groups import Group, Ranks


def test_a_number_depends_on_what_is_said_alone() -> None:
    assert number_of({"lr": 1e-3}) == number_of({"lr": 1e-3}) != number_of({"lr": 2e-3})
    assert 0 <= number_of("anything") < 2**62


def test_of_a_fake_group_this_rank_alone_is_heard() -> None:
    group = Group("g", (0, 1, 2), 1)
    channel = Channel(Ranks(group, group, "cpu", "fake"))
    assert channel.all_say([1, 2], own=3) == (True, 3)
    assert channel.everyone_says("here") == ["here"] * 3 and channel.rank == 1


def test_every_rank_hears_every_other(two_ranks: Any) -> None:
    alike = [seen["alike"] for seen in two_ranks("seeds")]
    assert alike[0] == alike[1] and alike[0].startswith("all 2 ranks have the random seed 7")
    assert [seen["apart"] for seen in two_ranks("seeds")] == ["", ""]
