"""A warning is given once, at the user's own line."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest

import fusion_compile
from fusion_compile._say_once import SayOnce


def test_each_subject_once_at_the_callers_line() -> None:
    say = SayOnce()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            say("lr", "first sentence")
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        say("other", "second sentence")
    assert [str(w.message) for w in caught] == ["first sentence", "second sentence"]
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_two_objects_know_nothing_of_each_other() -> None:
    with pytest.warns(UserWarning, match="b") as caught:
        SayOnce()("a", "b")
        SayOnce()("a", "b")
    assert len(caught) == 2


def test_a_frame_of_the_package_is_passed_over() -> None:
    """As where a method of ours says it: code that claims to lie in the package calls it."""
    path = str(fusion_compile.__file__)
    names: dict[str, Any] = {"say": SayOnce()}
    exec(compile("def ours():\n    say('x', 'sentence')\n", path, "exec"), names)
    with pytest.warns(UserWarning, match="sentence") as caught:
        names["ours"]()
    assert caught[0].filename == __file__
