"""What a real run reads."""

from __future__ import annotations

import contextlib
import cProfile
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import MISSING, read
from fusion_compile._capture.watch.reads import Reads, reading

SETTINGS = types.SimpleNamespace(loss=types.SimpleNamespace(weight=2.0), unread=1.0)


def reads_of(function: Callable[..., Any], *arguments: Any) -> Reads:
    with reading() as reads:
        function(*arguments)
    return reads


def labels(reads: Reads) -> dict[str, Any]:
    return {slot.label: read(slot) for slot in reads.slots}


def test_globals_alone() -> None:
    options = {"weight": 3.0}

    def loss(x: Tensor, more: types.SimpleNamespace) -> Tensor:
        return x.sum() * SETTINGS.loss.weight * options["weight"] * more.scale

    with reading(globals_alone=True) as reads:
        loss(torch.ones(2), types.SimpleNamespace(scale=1.0))
    assert labels(reads) == {
        "SETTINGS": SETTINGS,
        "SETTINGS.loss": SETTINGS.loss,
        "SETTINGS.loss.weight": 2.0,
    }


def test_globals_closures_and_arguments() -> None:
    options = {"weight": 3.0}

    def loss(x: Tensor) -> Tensor:
        return x.sum() * SETTINGS.loss.weight * options["weight"]

    assert labels(reads_of(loss, torch.ones(2))) == {
        "SETTINGS": SETTINGS,
        "SETTINGS.loss": SETTINGS.loss,
        "SETTINGS.loss.weight": 2.0,
        "options['weight']": 3.0,
    }


def test_a_users_c_profiler_goes_on() -> None:
    profile = cProfile.Profile()
    profile.enable()
    try:
        reads_of(len, [])
        now: object = sys.getprofile()
        assert now is profile
    finally:
        profile.disable()


def test_torch_nn_counts_and_the_rest_of_torch_does_not() -> None:
    found = labels(reads_of(nn.Sequential(nn.Dropout(0.25), nn.LeakyReLU(0.5)), torch.ones(2)))
    assert found["self.p"] == 0.25 and found["self.negative_slope"] == 0.5 and found["self.training"] is True
    assert not any("hooks" in label for label in found)
    assert labels(reads_of(F.dropout, torch.ones(2))) == {}


def test_a_property_is_not_evaluated_again_and_what_it_reads_is_seen() -> None:
    class Counted:
        def __init__(self) -> None:
            self.calls = 0
            self.kept = 4.0

        @property
        def weight(self) -> float:
            self.calls += 1
            return self.kept

    counted = Counted()
    found = labels(reads_of(lambda: counted.weight))
    assert counted.calls == 1 and found["self.kept"] == 4.0


def test_an_attribute_that_is_looked_for_and_absent_is_a_read() -> None:
    part = nn.Tanh()
    assert labels(reads_of(lambda m: getattr(m, "gain", 1.0), part)) == {"m.gain": MISSING}


def test_the_last_value_of_a_local_name_is_followed() -> None:
    parts = [types.SimpleNamespace(scale=5.0)]

    def loss() -> float:
        total = 0.0
        for part in parts:
            total += part.scale
        return total

    assert labels(reads_of(loss))["part.scale"] == 5.0


def test_names_hold_attributes_and_strings_of_code_that_ran() -> None:
    reads = reads_of(lambda m: getattr(m, "gain", SETTINGS.loss), nn.Tanh())
    assert {"gain", "loss"} <= reads.names and "unread" not in reads.names


def test_each_slot_is_found_once() -> None:
    reads = reads_of(lambda: [SETTINGS.loss.weight for _ in range(3)] + [SETTINGS.loss.weight])
    assert len({slot.identity for slot in reads.slots}) == len(reads.slots) == 3


def test_a_profiler_that_was_set_is_set_again_also_after_an_error() -> None:
    def profiler(*_: Any) -> None: ...

    def fails() -> None:
        raise KeyError("expected")

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        with contextlib.suppress(KeyError):
            reads_of(fails)
        after = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert after is profiler


def test_what_the_run_threw_away_is_not_kept() -> None:
    class Result:
        def __init__(self, value: Tensor, inner: Any = None) -> None:
            self.value, self.inner = value, inner

    def loss(x: Tensor) -> Tensor:
        result = Result(x, Result(x + 1))
        return use(result)

    def use(result: Result) -> Tensor:
        return result.value + result.inner.value + SETTINGS.unread

    with reading() as reads:
        x = torch.ones(2)
        loss(x)
    assert list(labels(reads)) == ["SETTINGS", "SETTINGS.unread"]
    kept = Result(torch.ones(2), Result(torch.ones(2)))
    assert {"result.value", "result.inner", "result.inner.value"} <= set(labels(reads_of(use, kept)))


def test_what_is_still_held_when_reading_ends_may_be_dropped_later() -> None:
    class Result:
        value = None

        def __init__(self) -> None:
            self.value = torch.ones(2)

    with reading() as reads:
        result = Result()
        (lambda r: r.value)(result)
    assert list(labels(reads)) == ["r.value"]
    alive = weakref.ref(result.value)
    del result
    reads.drop_temporaries()
    assert reads.slots == [] and alive() is None
