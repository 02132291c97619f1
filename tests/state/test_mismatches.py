"""Differences in names and shapes, one line each, and the sentence that refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._state.mismatches import difference, mismatches, refuse_mismatches

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


FP32, FP16, COUNT = torch.zeros(2), torch.zeros(2, dtype=torch.float16), torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize(
    ("wanted", "given", "words"),
    [
        (FP32, [0.0, 0.0], "a list in the checkpoint, a tensor here"),
        (FP32, torch.zeros(2, dtype=torch.int64), "torch.int64 in the checkpoint, torch.float32 here"),
        (FP32, torch.zeros(2, dtype=torch.bool), "torch.bool in the checkpoint, torch.float32 here"),
        (FP32, torch.zeros(2, dtype=torch.complex64), "torch.complex64 in the checkpoint, torch.float32 here"),
        (FP32, torch.zeros(2, device="meta"), "a tensor without data"),
        (FP32, torch.zeros(2).to_sparse(), "a tensor without data of its own (torch.sparse_coo"),
        (FP16, torch.tensor([1.0, 1e6]), "in which its values do not fit"),
        (COUNT, torch.tensor(2.5), "torch.float32 in the checkpoint, torch.int64 here"),
        (COUNT.to(torch.int32), torch.tensor(2**40), "in which its values do not fit"),
        (torch.zeros(2, dtype=torch.int64), FP32, "torch.float32 in the checkpoint, torch.int64 here"),
    ],
)
def test_what_would_become_something_else_is_a_difference(wanted: Tensor, given: Any, words: str) -> None:
    assert words in difference(wanted, given)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (FP32, torch.tensor([1.0, 2.0], dtype=torch.float64)),
        (FP16, torch.tensor([float("inf"), 65504.0])),
        (COUNT, torch.tensor(2.0)),  # counts were fp32 in version 0.1
        (COUNT, torch.tensor(3, dtype=torch.int32)),
    ],
)
def test_another_precision_that_holds_the_values_is_none(wanted: Tensor, given: Tensor) -> None:
    assert difference(wanted, given) == ""
