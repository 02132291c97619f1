"""Tests: what one rank proves before it meets the others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.conftest import assert_equal_to_one
from tests.ranks.conftest import one_process as one_process
from tests.ranks.conftest import two_ranks as two_ranks


def test_a_proof_that_fails_on_one_rank_stops_all(two_ranks: Any) -> None:
    one, other = two_ranks("proof_fails_on_one")
    assert one == other and one.startswith("ValueError: rank 1 of 2 refuses, and no rank goes on: the step is not")


@pytest.mark.exhaustive
@pytest.mark.parametrize("capture", ["read", "run"])
def test_a_captured_step_is_one_program_with_the_collectives_of_the_docs(
    two_ranks: Any, one_process: Any, capture: str
) -> None:
    expected = {
        "read": ["all_reduce"] * 4 + ["all_gather_into_tensor"],
        "run": ["reduce_scatter_tensor"] * 3 + ["all_reduce"] + ["all_gather_into_tensor"] * 5,
    }
    for found in two_ranks("captured"):
        assert_equal_to_one(found[capture], one_process("muon"))
        assert found[capture]["programs"] == 1
        assert sorted(found[capture]["collectives"]) == sorted(expected[capture])


@pytest.mark.exhaustive
def test_a_rank_may_compile_while_the_others_run(two_ranks: Any) -> None:
    one, other = two_ranks("compiles_alone")
    assert one == other and one["same"] and one["step"] == 3
