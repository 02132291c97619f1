"""The sentence about a change says the name, both values and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile._capture.python_state.slots import MISSING
from fusion_compile._capture.watch.change import Change, shown


def test_a_number() -> None:
    assert Change("model.1.p", 0.1, 0.2).sentence() == (
        "model.1.p was 0.1 when the program was captured and is 0.2 now. If it should change between calls, make it a "
        "0-dim tensor and write it with fill_(), or make it a hyperparameter; otherwise call `step.recapture()` after "
        "changing it."
    )


def test_a_tensor() -> None:
    assert Change("t", torch.ones(2), torch.ones(2)).sentence("sampler.recapture()") == (
        "t was a tensor (2,) of torch.float32 on cpu when the program was captured and is another tensor (2,) of "
        "torch.float32 on cpu now. Write into the old tensor with copy_(), or call `sampler.recapture()` after "
        "replacing it."
    )


def test_a_setting_noticed_late() -> None:
    assert Change("torch.x", False, True, kind="setting", late=2).sentence() == (
        "torch.x was False when the program was captured and is True now. It is compared in turns: up to 2 steps may "
        "have run without the change. Call with the same setting, or call `step.recapture()` after changing it."
    )


def test_what_appears_and_what_goes() -> None:
    assert Change("x", MISSING, 1).sentence().startswith("x is 1 now and did not exist when the program was captured.")
    assert Change("x", 1, MISSING).sentence().startswith("x was 1 when the program was captured and is gone now.")


class Loud:
    def __repr__(self) -> str:
        raise AssertionError("a user's __repr__ was called")


SHOWN: list[tuple[Any, str]] = [
    ([1, 2], "[1, 2]"),
    (frozenset({1}), "{1}"),
    ([Loud()], "a list of 1"),
    (list(range(13)), "a list of 13"),
    (Loud(), "a Loud"),
    (nn.Tanh(), "a Tanh"),
    (nn.Tanh, "Tanh"),
    ("a" * 100, "'" + "a" * 76 + "..."),
    (torch.float16, "torch.float16"),
]


@pytest.mark.parametrize(("value", "expected"), SHOWN)
def test_values_are_described_without_running_users_code(value: Any, expected: str) -> None:
    assert shown(value) == expected
