"""Each thing that runs leave behind is called what it is, and put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion_compile._capture.rehearsal.contents import Contents, holds_fake
from tests.capture.leaving_programs import PROGRAMS, Program
from tests.capture.small_programs import kinds, rehearsed


@pytest.mark.parametrize(("make", "expected"), PROGRAMS, ids=[make.__name__ for make, _ in PROGRAMS])
def test_what_is_left_is_called_what_it_is_and_put_back(make: Callable[[], Program], expected: dict[str, str]) -> None:
    torch.manual_seed(0)
    program = make()
    roots = {"model": program[0], "loss_fn": program[1]}
    before = Contents(roots)
    numbers = {id(t): t.detach().clone() for _, t in before.reach.tensors.values()}

    rehearsal = rehearsed(*program)

    assert kinds(rehearsal) == expected
    assert [change.label for change in before.changes()] == [] and before.moved_generators() == []
    after = Contents(roots).reach.tensors
    assert after.keys() == before.reach.tensors.keys(), "a tensor that a run made can still be reached"
    assert [label for label, t in after.values() if not torch.equal(t, numbers[id(t)])] == []
    assert all(tensor.grad_fn is None for _, tensor in after.values()) and holds_fake(roots) == []
