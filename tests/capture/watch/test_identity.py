"""Identity, not equality."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._capture.watch import identity
from fusion_compile._capture.watch.identity import SameObjects


def check() -> None:
    one, value = float("1.5"), torch.ones(1)
    same = SameObjects([one, value, None])
    assert same([one, value, None]) and same(iter((one, value, None)))
    assert not same([float("1.5"), value, None])
    assert not same([one, torch.ones(1), None])
    assert not same([value, one, None])
    assert not same([one, value])
    assert not same([one, value, None, None])
    assert SameObjects([])([]) and not SameObjects([])([None])


def test_the_same_objects_in_the_same_order() -> None:
    assert identity._READS_ADDRESSES
    check()


def test_where_python_lays_tuples_out_differently(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(identity, "_READS_ADDRESSES", False)
    check()


def test_what_is_remembered_lives_on() -> None:
    """Another object could get its address otherwise."""
    same = SameObjects([[1], [2]])
    assert same.values == ([1], [2]) and not same([[1], [2]])
