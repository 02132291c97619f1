"""Repeats of a sequence, against a search through all substrings."""

from __future__ import annotations

import random

from fusion_compile.passes._repeats import Repeat, find_repeats


def test_equal_blocks_are_found_at_every_phase() -> None:
    found = set(find_repeats([7, 1, 2, 3, 1, 2, 3, 9]))
    assert Repeat((1, 4), 3) in found
    assert all(len(repeat.starts) == 2 for repeat in found)


def test_nothing_repeats_in_a_sequence_of_different_tokens() -> None:
    assert list(find_repeats([1, 2, 3, 4])) == []


def test_every_repeat_occurs_without_overlap_and_the_longest_is_among_them() -> None:
    draw = random.Random(0)
    for _ in range(50):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(2, 14))]
        found = list(find_repeats(tokens))
        for repeat in found:
            pieces = {tuple(tokens[s : s + repeat.length]) for s in repeat.starts}
            assert len(pieces) == 1 and len(repeat.starts) > 1
            assert all(b - a >= repeat.length for a, b in zip(repeat.starts, repeat.starts[1:], strict=False))
        longest = max(
            (
                n
                for n in range(1, len(tokens) // 2 + 1)
                for a in range(len(tokens))
                for b in range(a + n, len(tokens) - n + 1)
                if tokens[a : a + n] == tokens[b : b + n]
            ),
            default=0,
        )
        assert max((repeat.length for repeat in found), default=0) == longest
