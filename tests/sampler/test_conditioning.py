"""Exact, Batched and Rank: what they check and what is refused in their place."""

from __future__ import annotations

import math
from typing import Any

import pytest

import fusion_compile as fc
from fusion_compile._sampler.conditioning import refuse_unknown


def test_kinds_are_values() -> None:
    assert fc.Exact() == fc.Exact() and fc.Rank(8, (0, 1)) == fc.Rank(8, (0, 1)) != fc.Rank(8)
    for kind in (fc.Exact(), fc.Batched(), fc.Rank(8)):
        refuse_unknown(kind)


@pytest.mark.parametrize("other", ["exact", fc.Exact, None, 64], ids=str)
def test_anything_else_is_refused_with_the_kinds(other: Any) -> None:
    with pytest.raises(TypeError, match=r"pass Exact\(\), Batched\(\) or Rank\(64, \(0, 1\)\)"):
        refuse_unknown(other)


@pytest.mark.parametrize("ends", [(1, 1), (0, math.inf), (math.nan, 1), (0, 1, 2)], ids=str)
def test_a_range_needs_two_different_finite_ends(ends: Any) -> None:
    with pytest.raises(ValueError, match="a range has two different finite ends"):
        fc.Rank(8, ends)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Rank\(rank=0\): a subspace has at least one dimension"):
        fc.Rank(0)


@pytest.mark.parametrize(
    "arguments", [("a",), (2.5,), (True,), (2, 3), (2, "ab"), (2, ("a", 1)), (2, (False, True)), (2, {0, 1})]
)
def test_a_rank_or_range_of_another_kind_is_refused(arguments: Any) -> None:
    with pytest.raises(TypeError, match=r"^Rank\((rank|range)=.*, (64 for example|such as \(0, 1\) or \(0, 999\))\.$"):
        fc.Rank(*arguments)
