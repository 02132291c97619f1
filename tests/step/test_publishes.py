"""Tests: the model shows the weights of the last publication, and whatever reads them all publishes first."""

from __future__ import annotations

import pytest

from tests.ranks import programs as P
from tests.ranks.full_scenarios import of_two


def test_weights_are_shown_every_so_many_steps_and_are_those_of_a_step_that_always_shows_them() -> None:
    for seen in of_two("published"):
        as_at_first, as_now = [True, False], [False, True]
        assert seen["seen"] == [as_at_first, as_at_first, as_now, [False, False], [False, False]]


def test_what_reads_all_weights_publishes_first() -> None:
    for seen in of_two("published"):
        assert seen["evaluated"] and seen["saved"] and seen["then"] and seen["released"]


def test_a_write_into_old_weights_is_refused() -> None:
    for seen in of_two("published"):
        assert "blocks.0.b.weight was written, and the model shows the weights of 2 steps ago" in seen["written"]


def test_where_it_has_no_use_it_is_refused() -> None:
    for seen in of_two("published"):
        assert "publish_every=2 with shard='optimizer', muon: it is for Schedule-Free" in seen["no use"]
        assert "publish_every=0 is not a number of steps" in seen["no number"]
    with pytest.raises(ValueError, match="publish_every=3 without mesh= has no effect"):
        P.step_of("sf_normuon", publish_every=3)
