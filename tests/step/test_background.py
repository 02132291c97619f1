"""Tests: what is written in the background is waited for, and what it raises is said."""

from __future__ import annotations

import threading

import pytest

from fusion_compile._step.background import Background


def test_the_next_one_waits_for_the_last() -> None:
    background, goes, said = Background(), threading.Event(), []

    def write() -> None:
        goes.wait(10)
        said.append("written")

    saving = background.begin(write)
    assert not saving.done() and not said
    goes.set()
    background.wait()
    assert saving.done() and said == ["written"]
    background.wait()


@pytest.mark.filterwarnings("ignore:in the background. the disk is full")
def test_what_fails_is_raised_where_it_is_asked_for() -> None:
    background = Background()

    def write() -> None:
        raise OSError("the disk is full")

    saving = background.begin(write)
    background.wait()
    with pytest.raises(OSError, match="the disk is full"):
        saving.result()
