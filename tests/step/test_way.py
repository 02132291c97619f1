"""Which way a step is captured, from what a rehearsal left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot
from fusion_compile._capture.rehearsal.left_behind import Kind, Left, in_a_cache
from fusion_compile._capture.rehearsal.provenance import Depends
from fusion_compile._capture.rehearsal.reach import Found
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal
from fusion_compile._capture.sources.sources import Sources
from fusion_compile._step.way import Asked, choose, refuse_sources, tagged


def left(kind: Kind, label: str = "model.a", before: Any = 0, key: Any = "a") -> Left:
    return Left(label, Slot({}, key, label), kind, before, 1, 2, (1, 2), Depends.NOTHING)


def rehearsed(*records: Left, not_put_back: tuple[str, ...] = ()) -> Rehearsal:
    return Rehearsal((None, None), records, False, {}, (), (), 0, not_put_back, (), 2)


def test_nothing_left_behind_is_read_unless_running_is_asked_for() -> None:
    assert choose(rehearsed(left(Kind.CACHE)), Asked(None)) == (False, "", (), (), "")
    assert choose(rehearsed(), Asked("run")).runs


def test_state_and_numbers_run_and_reading_is_refused_then() -> None:
    state, number = left(Kind.STATE, "model.mean"), left(Kind.NUMBER, "model.n")
    way = choose(rehearsed(state, number), Asked(None))
    assert (way.runs, way.carried, way.numbers) == (True, (state,), (number,))
    assert way.because == "model.mean, model.n change at every forward, outside of the model's buffers"
    with pytest.raises(ValueError, match=r"model.mean changes at every forward.*make it a buffer of the model"):
        choose(rehearsed(state), Asked("read"))


def test_a_gradient_hook_runs() -> None:
    assert choose(rehearsed(), Asked(None, hooked=["w"])).because == "w has a gradient hook (register_hook)"


ONCE = {
    "initialised": (left(Kind.INITIALISED_ONCE), "model.a is set by the first forward from its inputs"),
    "drawn": (left(Kind.DRAWN_ONCE), "model.a is drawn at random by the first forward"),
    "a new number": (left(Kind.NUMBER, before=MISSING), "model.a is made by the first forward"),
}


@pytest.mark.parametrize("name", ONCE)
def test_an_initialising_step_waits_once(name: str) -> None:
    record, why = ONCE[name]
    assert choose(rehearsed(record), Asked(None, may_wait=True)).not_yet == why
    with pytest.raises(ValueError, match=f"{why} after it was set already"):
        choose(rehearsed(record), Asked(None))


def test_what_is_carried_already_is_no_initialisation() -> None:
    way = choose(rehearsed(left(Kind.INITIALISED_ONCE)), Asked("run", carries={"model.a"}))
    assert way == (True, "", (), (), "")


NEVER = {
    Kind.GROWS: "is longer after every forward",
    Kind.SHRINKS: "is shorter after every forward",
    Kind.MUTATED: "is a numpy array that every forward changes",
    Kind.OTHER: "is not what it was after a forward",
}


@pytest.mark.parametrize("kind", NEVER)
def test_what_no_program_can_is_refused_by_name(kind: Kind) -> None:
    records = [left(kind), left(kind, "model.b")]
    with pytest.raises(ValueError, match=rf"model.a {NEVER[kind]}.*\(1 more: model.b\)"):
        choose(rehearsed(*records), Asked(None, may_wait=True))
    assert choose(rehearsed(*records), Asked(None, uncompiled=True)).runs


def test_a_whole_container_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.a changes at every forward, and a program has it as it was"):
        choose(rehearsed(left(Kind.NUMBER, key=WHOLE)), Asked(None))


def test_an_iterator_that_was_moved_on_is_refused_in_every_mode() -> None:
    with pytest.raises(ValueError, match=r"it gives other items at every forward and cannot be set back"):
        choose(rehearsed(not_put_back=("it",)), Asked(None, uncompiled=True))


def test_a_source_is_refused_with_the_reason_for_not_reading() -> None:
    with Sources() as sources:
        torch.manual_seed(torch.initial_seed())
    refuse_sources([], "")
    with pytest.raises(ValueError, match=r"torch.manual_seed\(\).* It is not captured by reading, because of a test"):
        refuse_sources(sources.found, "of a test")


def test_a_tensor_from_a_cache_runs_and_one_that_the_first_step_made_is_refused() -> None:
    seen = replace(rehearsed(), handed_out=("norm",))
    way = choose(seen, Asked(None))
    assert way.runs and "norm(…) gives out a tensor that functools.lru_cache keeps" in way.because
    with pytest.raises(ValueError, match=r"leave out capture='read', or keep the tensor in an attribute"):
        choose(seen, Asked("read"))
    made = in_a_cache(Found("norm", None), Depends.INPUTS)
    with pytest.raises(ValueError, match=r"norm\(…\) is set by the first forward .* functools.lru_cache"):
        choose(rehearsed(made), Asked(None))
    assert choose(rehearsed(made), Asked(None, uncompiled=True)).runs


def test_parameters_with_attributes_run() -> None:
    model: Any = torch.nn.Linear(2, 2)
    assert tagged(model) == []
    model.weight._private = model.bias.lr_scale = 2.0
    assert tagged(model) == ["bias"]
    assert "bias carries attributes of its own" in choose(rehearsed(), Asked(None, tagged=["bias"])).because
    with pytest.raises(ValueError, match=r"leave out capture='read', or keep the attributes in a dictionary by name"):
        choose(rehearsed(), Asked("read", tagged=["bias"]))
