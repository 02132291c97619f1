"""Every kind of change between two calls is noticed, under the name that its reader knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion_compile._capture.watch.reads import reading
from fusion_compile._capture.watch.watch import Watch
from tests.capture import changed_losses, changed_modules
from tests.capture.changed_program import PROGRAMS, Part, Program, around, of_loss, of_model, plain_loss

assert changed_losses and changed_modules, "importing them fills PROGRAMS"
SETTINGS = changed_losses.SETTINGS


def watched(program: Program) -> Watch:
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    with reading() as reads:
        program.loss(program.model, x, y).backward()
    return Watch({"model": program.model, "loss": program.loss}, reads)


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_change_is_noticed(make: Callable[[], Program]) -> None:
    program = make()
    watch = watched(program)
    for _ in range(watch.turns):
        program.loss(program.model, torch.randn(5, 4), torch.randn(5, 2)).backward()
        assert watch.changed() is None
    program.change()
    change = watch.changed()
    late = 0
    while change is None and late < watch.turns:
        change, late = watch.changed(), late + 1
    assert change is not None
    assert change.label.partition("[")[0] == program.label.partition("[")[0]
    assert program.label in change.sentence()
    assert change.late >= late
    watch.remember()
    assert all(watch.changed() is None for _ in range(watch.turns))


def test_a_namespace_changes_unnoticed_where_no_code_that_ran_names_it() -> None:
    program = of_loss(lambda out: SETTINGS.weight, lambda: setattr(SETTINGS, "unread", 1), "")
    watch = watched(program)
    program.change()
    assert all(watch.changed() is None for _ in range(watch.turns))


def test_new_objects_of_equal_value_are_no_change_and_are_compared_by_value_from_then_on() -> None:
    program = of_model(Part(lambda self, x: x * self.scales[0], scales=[0.5]), lambda m: None, "")
    watch = watched(program)
    for _ in range(3):
        program.model[1].scales = [float("0.5")]  # type: ignore[index]
        assert watch.changed() is None
    program.model[1].scales = [0.75]  # type: ignore[index]
    change = watch.changed()
    assert change is not None and (change.label, change.before, change.after) == ("model.1.scales", [0.5], [0.75])


def test_a_value_written_in_place_is_no_change() -> None:
    program = Program(plain_loss, lambda: None, "", around(torch.nn.BatchNorm1d(8)))
    watch = watched(program)
    with torch.no_grad():
        for p in program.model.parameters():
            p.mul_(0.5)
    assert all(watch.changed() is None for _ in range(watch.turns))
