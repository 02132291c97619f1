"""Values are compared bitwise, and copies share no memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fusion_compile._capture.rehearsal.values import is_equal, snapshot

NAN = float("nan")


class Opaque:
    pass


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.tensor([NAN]), torch.tensor([NAN]), True),
        (torch.ones(2), torch.ones(2).nextafter(torch.tensor(2.0)), False),
        (torch.ones(2), torch.ones(2).double(), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.tensor(1 + 1j).conj(), torch.tensor(1 - 1j), True),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), True),
        (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse(), False),
        ([torch.ones(2), 1], [torch.ones(2), 1], True),
        ({"a": (1, 2)}, {"a": (1, 2)}, True),
        ({"a": 1}, {"b": 1}, False),
        ([1], [1, 2], False),
        (1, 1.0, False),
        (NAN, NAN, True),
        (np.ones(2), np.ones(2), True),
        (np.ones(2), np.ones(2) + 1, False),
        (Opaque(), Opaque(), False),
    ],
)
def test_equality_is_bitwise(a: Any, b: Any, equal: bool) -> None:
    assert is_equal(a, b) is equal


def test_opaque_objects_of_one_type_may_count_as_equal() -> None:
    assert is_equal([Opaque(), 1], [Opaque(), 1], opaque_are_equal=True)
    assert not is_equal([Opaque(), 1], [Opaque(), 2], opaque_are_equal=True)


def test_a_snapshot_shares_no_memory() -> None:
    tensor = torch.ones(2, requires_grad=True)
    copy = snapshot({"a": [tensor * 2]})
    assert torch.equal(copy["a"][0], torch.full((2,), 2.0)) and not copy["a"][0].requires_grad
