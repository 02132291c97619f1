"""Tests: matrices are shared out evenly, and never padded."""

from __future__ import annotations

from fusion_compile._ranks.shards.owners import cost_of, owners


def test_equal_matrices_go_round() -> None:
    load = [0.0] * 4
    found = owners({f"m{i}": 1.0 for i in range(10)}, 4, load)
    assert sorted(list(found.values()).count(rank) for rank in range(4)) == [2, 2, 3, 3]
    assert sum(load) == 10.0
    assert list(found) == [f"m{i}" for i in range(10)]


def test_fewer_matrices_than_ranks_leave_ranks_without() -> None:
    assert sorted(owners({"a": 1.0, "b": 1.0}, 64, [0.0] * 64).values()) == [0, 1]


def test_the_dearest_are_given_first() -> None:
    found = owners({"small": 1.0, "large": 10.0, "other": 1.0}, 2, [0.0, 0.0])
    assert found["small"] == found["other"] != found["large"]
    assert owners({"a": 1.0}, 2, [5.0, 1.0]) == {"a": 1}


def test_a_wide_matrix_costs_what_a_long_one_does() -> None:
    assert cost_of((2, 8)) == cost_of((8, 2)) == 2 * 8 * 4 + 8
