"""Indexing as a whole, and the one position in it that a number decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._capture.numbers.positions import indexing, position


class N:
    """Stands for the int 2."""


def follows(value: Any) -> bool:
    return type(value) is N


def plain(value: Any) -> Any:
    return 2 if follows(value) else value


TABLE = torch.arange(60.0).view(3, 4, 5)
GET: Any = Tensor.__getitem__


@pytest.mark.parametrize(
    ("func", "args", "around", "axis", "length"),
    [
        (GET, (TABLE, N()), (slice(None),), 0, None),
        (GET, (TABLE, (slice(None), N())), (slice(None), slice(None)), 1, None),
        (GET, (TABLE, (0, slice(N(), 3))), (0, slice(None)), 0, 1),
        (GET, (TABLE, (..., slice(0, N()))), (..., slice(None)), 2, 2),
        (GET, (TABLE, (None, 1, slice(N(), None))), (None, 1, slice(None)), 1, 2),
        (torch.select, (TABLE, 1, N()), (slice(None), slice(None)), 1, None),
        (torch.narrow, (TABLE, -1, N(), 2), None, None, None),
    ],
)
def test_the_place_and_what_the_call_does(func: Any, args: Any, around: Any, axis: int | None, length: Any) -> None:
    if func is torch.narrow:  # start + length is computed from the number, which this stand-in does not do
        args = (*args[:2], 2, 2)
    call = indexing(func, args, {}, follows)
    wanted = func(args[0], *_plain(args[1:]))
    assert torch.equal(call.map(plain).do(), wanted)
    if around is not None:
        found = position(call, follows, plain)
        assert found is not None
        assert (found.around, found.axis) == (around, axis)
        assert (None if found.stop is None else plain(found.stop) - plain(found.start)) == length


def _plain(args: Any) -> Any:
    def one(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(one, value))
        return slice(one(value.start), one(value.stop)) if type(value) is slice else plain(value)

    return one(args)


def test_a_range_has_no_tensor() -> None:
    call = indexing(torch.arange, (N(), 5), {"dtype": torch.int32}, follows)
    assert torch.equal(call.map(plain).do(), torch.arange(2, 5, dtype=torch.int32))
    found = position(call, follows, plain)
    assert found is not None and found.size is None


@pytest.mark.parametrize("index", [torch.tensor([0]), [0, 1], True, (N(), torch.tensor([0])), "x"])
def test_indices_of_another_kind_are_left_to_torch(index: Any) -> None:
    assert indexing(GET, (TABLE, index), {}, follows) is None


def test_a_slice_may_end_behind_the_last_entry() -> None:
    found = position(indexing(GET, (TABLE[:1], slice(0, N())), {}, follows), follows, plain)
    assert found is not None
    assert found.stop == 1 and follows(found.beyond)


def test_two_positions_are_none() -> None:
    call = indexing(GET, (TABLE, (N(), N())), {}, follows)
    assert position(call, follows, plain) is None


def test_other_calls_are_none() -> None:
    assert indexing(torch.add, (TABLE, N()), {}, follows) is None
    assert indexing(torch.arange, (0, 4, 2), {}, follows) is None
