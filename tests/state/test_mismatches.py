"""Differences in names and shapes, one line each, and the sentence that refuses them."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._state.mismatches import mismatches, refuse_mismatches

WANTED = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}


def test_missing_unexpected_and_mismatched_in_this_order() -> None:
    given = {"b": torch.zeros(3, 2), "c": torch.zeros(1)}
    assert mismatches(WANTED, given, "state {}".format) == [
        "missing state a",
        "unexpected state c",
        "mismatched state b: [3, 2] in the checkpoint, [2, 3] here",
    ]
    assert mismatches(WANTED, given, str, complete=False) == ["mismatched b: [3, 2] in the checkpoint, [2, 3] here"]
    assert mismatches(WANTED, dict(WANTED), str) == []


def test_no_line_is_no_refusal_and_many_are_cut_after_twenty() -> None:
    refuse_mismatches([], "Never said.")
    with pytest.raises(ValueError, match=r"nothing was loaded:\n  missing 0\n") as caught:
        refuse_mismatches([f"missing {i}" for i in range(25)], "Give another.")
    message = str(caught.value)
    assert message.endswith("missing 19\n  … and 5 more\nGive another.")
